"""The benchmark on two clips in the real layout: rendered by toyworld, edited by the real stages with few steps."""

from __future__ import annotations

import csv
import fcntl
import math
import shutil
import statistics
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flows import benchmark
from flows.benchmark import ClipResult, category_means, open_benchmark
from tasks.clip_stages import ClipStages
from tav.config.metrics import METRICS
from tav.config.stages import STAGES
from tav.media.loveu_tgve import Entry
from tav.runtime.events import Event, EventStream, StageFinished
from tav_model.errors import TavError
from tav_model.video import read_video
from tests.support.loveu_tgve import CATEGORIES, NAMES, quick_overrides, write_benchmark
from tests.support.projects import ROOT

OUT = Path("results/benchmarks/tgve")


class Progress:
    """An observer that keeps what it receives."""

    def __init__(self) -> None:
        self.clips: list[str] = []
        self.stages: list[str] = []

    def clip_started(self, entry: Entry) -> None:
        self.clips.append(entry.name)

    def stage_advanced(self, stage: str, done: int, total: int) -> None:
        if stage not in self.stages[-1:]:
            self.stages.append(stage)


def run(
    monkeypatch: pytest.MonkeyPatch, root: Path, folder: str = "tgve", only: tuple[str, ...] = (), **changes: object
) -> list[ClipResult]:
    """The results of the benchmark in a project's folder."""
    monkeypatch.chdir(root)
    with open_benchmark(root, Path(folder), OUT, quick_overrides(**changes), only) as prepared:
        return list(prepared.results(EventStream(), lambda entry: None))


def errors(results: list[ClipResult]) -> dict[str, str | None]:
    """By clip; None: it is up to date."""
    return {result.entry.name: result.error and str(result.error) for result in results}


UP_TO_DATE = {f"{of_set}/{name}": None for of_set, name in NAMES.items()}


def rows(root: Path) -> list[dict[str, str]]:
    with (root / OUT / "results.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def submission(root: Path) -> dict[str, list[str]]:
    """The images of each folder that has some."""
    top = root / OUT / "submission"
    found: dict[str, list[str]] = {}
    for path in sorted(top.rglob("*.*")):
        found.setdefault(path.parent.relative_to(top).as_posix(), []).append(path.name)
    return found


def recording(monkeypatch: pytest.MonkeyPatch, stop_at: tuple[str, str] | None = None) -> list[tuple[str, str]]:
    """The stages that are run from now on; at one of them the user stops everything."""
    ran: list[tuple[str, str]] = []
    real = ClipStages.run

    def run(self: ClipStages, stage: str) -> None:
        ran.append((self.clip.rpartition("-")[2], stage))
        if ran[-1] == stop_at:
            raise KeyboardInterrupt
        real(self, stage)

    monkeypatch.setattr(ClipStages, "run", run)
    return ran


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which the benchmark has run once."""
    root = tmp_path_factory.mktemp("finished")
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, root)
    write_benchmark(root / "tgve")
    shutil.copy(root / "params.yaml", root / "tgve" / "params.before")
    clips: list[str] = []
    stages: list[str] = []

    def note(event: Event) -> None:
        if isinstance(event, StageFinished):
            stages.append(event.stage)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(root)
        with open_benchmark(root, Path("tgve"), OUT, quick_overrides(), []) as prepared:
            assert prepared.up_to_date == []
            results = list(prepared.results(EventStream(note), lambda entry: clips.append(entry.name)))
            assert errors(results) == UP_TO_DATE
            assert set(prepared.scores) == set(UP_TO_DATE)
    assert clips == list(UP_TO_DATE)
    assert stages == [*STAGES] * 2
    return root


@pytest.fixture
def project(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoilt."""
    return Path(shutil.copytree(finished, tmp_path / "project", symlinks=True))


def test_every_edit_and_its_scores(finished: Path) -> None:
    table = rows(finished)
    assert [(row["set"], row["clip"], row["category"]) for row in table] == [
        (of_set, name, category) for of_set, name in NAMES.items() for category in CATEGORIES
    ]
    assert table[1]["prompt"] == "a red cube is bouncing on the grass"
    for name in ("textual_alignment", "frame_consistency", "warping_error", "flicker"):
        assert all(math.isfinite(float(row[name])) for row in table)
    assert len({row["textual_alignment"] for row in table}) == 8


def test_table_by_category(finished: Path) -> None:
    lines = (finished / OUT / "results.md").read_text().splitlines()
    assert lines[0] == "# LOVEU-TGVE-2023: 2 of 2 clips, 8 edits"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert cells[0] == ["", *CATEGORIES, "all"] and cells[2] == ["edits", "2", "2", "2", "2", "8"]
    (alignment,) = [line for line in cells if line[0] == "textual_alignment"]
    table = rows(finished)
    for place, category in enumerate(CATEGORIES, 1):
        values = [float(row["textual_alignment"]) for row in table if row["category"] == category]
        assert alignment[place] == METRICS["textual_alignment"].text(statistics.fmean(values))
    mean = statistics.fmean(float(row["textual_alignment"]) for row in table)
    assert alignment[5] == METRICS["textual_alignment"].text(mean)


def test_means_of_the_scores_that_exist() -> None:
    some, other = {"style": {"flicker": 0.5, "psnr": 20.0}}, {"style": {"flicker": 0.25}, "object": {"flicker": 0.0}}
    means = category_means([some, other])
    assert means["style"] == {"edits": 2, "flicker": 0.375, "psnr": 20.0}
    assert means["object"] == {"edits": 1, "flicker": 0.0}
    assert means["multiple"] == {"edits": 0}
    assert means["all"] == {"edits": 3, "flicker": 0.25, "psnr": 20.0}


def test_submission_has_the_layout_of_the_benchmark(finished: Path) -> None:
    images = ["00000.jpg", "00001.jpg"]
    expected = {f"{of_set}/{name}/{category}": images for of_set, name in NAMES.items() for category in CATEGORIES}
    assert submission(finished) == dict(sorted(expected.items()))
    for folder in expected:
        of_set, name, category = folder.split("/")
        edits = finished / OUT / "work" / "results" / f"{of_set.lower()}-{name}" / "edits"
        frames = read_video(edits / f"{category}.mp4")[0]
        for frame, file in zip(frames, images, strict=True):
            with Image.open(finished / OUT / "submission" / folder / file) as image:
                assert (image.format, image.size, image.mode) == ("JPEG", (480, 480), "RGB")
                shrunk = np.asarray(image.resize((64, 64), Image.Resampling.BOX)).astype(float)
            assert np.abs(shrunk - frame).mean() < 6


def test_nothing_is_written_elsewhere(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {"params.yaml", "dvc.yaml", "tgve", "results"}
    assert {path.name for path in (finished / "results" / "benchmarks").iterdir()} == {"tgve"}
    assert (finished / "params.yaml").read_text() == (finished / "tgve" / "params.before").read_text()
    assert {path.name for path in (finished / "tgve").iterdir()} == {
        *NAMES,
        "LOVEU-TGVE-2023_Dataset.csv",
        "params.before",
    }


def test_a_second_run_renders_nothing(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = rows(project)
    ran = recording(monkeypatch)
    assert errors(run(monkeypatch, project)) == UP_TO_DATE
    assert ran == [] and rows(project) == before
    # The place of the frames and the sizes of batches change no result.
    (project / "tgve").rename(project / "elsewhere")
    assert errors(run(monkeypatch, project, "elsewhere", runtime__decode_chunk=2)) == UP_TO_DATE
    assert ran == []


def test_a_run_that_was_stopped_resumes_and_keeps_no_old_scores(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = {row["clip"]: row["textual_alignment"] for row in rows(project)}
    with monkeypatch.context() as patch:
        ran = recording(patch, stop_at=("fish", "score"))
        with pytest.raises(KeyboardInterrupt):
            run(patch, project, edit__guidance_scale=2.0)
    # Tuned weights and inverted latents do not depend on the guidance scale.
    assert ran == [("ball", "edit"), ("ball", "score"), ("fish", "edit"), ("fish", "score")]
    assert {row["clip"] for row in rows(project)} == {"ball"} and rows(project)[3]["textual_alignment"] != old["ball"]
    assert {folder.partition("/")[0] for folder in submission(project)} == {"DAVIS_480p"}
    assert "Not in the table: youtube_480p/fish." in (project / OUT / "results.md").read_text()
    ran = recording(monkeypatch)
    assert errors(run(monkeypatch, project, edit__guidance_scale=2.0)) == UP_TO_DATE
    assert ran == [("fish", "score")]
    assert len(rows(project)) == 8 and len(submission(project)) == 8


def test_a_broken_clip_fails_alone(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = project / "tgve" / "DAVIS_480p" / "480p_frames" / "ball" / "00002.jpg"
    intact = frame.read_bytes()
    frame.write_bytes(b"no picture")
    shutil.rmtree(project / OUT / "work" / "results" / "youtube_480p-fish" / "scores")
    ran = recording(monkeypatch)
    found = errors(run(monkeypatch, project))
    assert ran == [("ball", "decode")]  # The lost scores come back from DVC's cache.
    assert found["youtube_480p/fish"] is None
    assert "00002.jpg: not an image that can be read" in (found["DAVIS_480p/ball"] or "")
    assert {row["clip"] for row in rows(project)} == {"fish"}
    assert {folder.partition("/")[0] for folder in submission(project)} == {"youtube_480p"}
    frame.write_bytes(intact)
    assert errors(run(monkeypatch, project)) == UP_TO_DATE
    assert len(rows(project)) == len(submission(project)) == 8


def test_one_clip_alone(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def fails(folder: Path, clip: str, events: object) -> None:
        ran.append((folder, clip))
        raise RuntimeError("why")

    monkeypatch.setattr(benchmark, "run_clip", fails)
    assert errors(run(monkeypatch, project, only=("youtube_480p/fish",), seed=7)) == {"youtube_480p/fish": "why"}
    assert ran == [(OUT / "work", "youtube_480p-fish")]


def test_run_clip_needs_only_the_work_folder_and_a_name(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, clip = project / OUT / "work", "davis_480p-ball"
    (work / "dvc.lock").unlink()
    shutil.rmtree(work / ".dvc" / "cache")
    ran: list[str] = []
    monkeypatch.setattr(ClipStages, "run", lambda self, stage: ran.append(stage))
    scores = benchmark.run_clip(work, clip)
    assert ran == list(STAGES) and set(scores) == set(CATEGORIES)
    with pytest.raises(TavError, match="no clip named 'cat'"):
        benchmark.run_clip(work, "cat")


def test_models_of_the_project_are_found(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from toyworld import WEIGHTS

    (project / "models").mkdir()
    (project / "models" / "scorer").symlink_to(WEIGHTS / "scorer")
    ran = recording(monkeypatch)
    found = run(monkeypatch, project, only=("DAVIS_480p/ball",), score__clip_model="models/scorer")
    assert errors(found) == {"DAVIS_480p/ball": None}
    assert ran == [("ball", "score")]
    assert (project / OUT / "work" / "models" / "scorer").is_symlink()


@pytest.mark.parametrize(
    ("folder", "only", "overrides", "error"),
    [
        ("nowhere", [], [], "nowhere: no such folder"),
        ("tgve", ["fish"], [], "--only: no clip 'fish'; must be SET/CLIP, one of: DAVIS_480p/ball, youtube_480"),
        ("tgve", [], ["tune.steps"], "--set: 'tune.steps' is not allowed: must be KEY=VALUE"),
        ("tgve", [], ["tune.step=3"], "override tune.step: unknown key; did you mean steps?"),
        ("tgve", [], ["tune.steps=-1"], "tune.steps: -1 is not allowed: must be a whole number"),
        ("tgve", [], ["clips.ball.caption=x"], "the clips are the benchmark's; --only chooses among them"),
        ("tgve", [], ["base_model=missing"], "no model 'missing': it is neither a folder"),
        ("tgve", [], ["runtime.device=cuda:99"], "runtime.device: 'cuda:99' is not usable here"),
    ],
)
def test_mistakes_are_refused_before_any_work(
    finished: Path, tmp_path: Path, folder: str, only: list[str], overrides: list[str], error: str
) -> None:
    out = tmp_path / "out"
    with pytest.raises(TavError) as refused, open_benchmark(finished, finished / folder, out, overrides, only):
        pytest.fail("it was prepared")
    assert error in str(refused.value) and "\n" not in str(refused.value)
    assert not out.exists()


def test_entries_that_leave_the_folder_are_refused(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = project / "tgve" / "LOVEU-TGVE-2023_Dataset.csv"
    table.write_text(table.read_text().replace("\nfish,", "\n../../secret,"))
    with pytest.raises(TavError, match=r"line 6: Video name: '\.\./\.\./secret' is not allowed"):
        run(monkeypatch, project)


def test_one_benchmark_at_a_time(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (project / OUT / ".lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(TavError, match="another benchmark is running there; wait for it, or choose another --out"):
            run(monkeypatch, project)
