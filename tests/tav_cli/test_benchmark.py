"""`tav benchmark` on two clips in the real layout: rendered by toyworld, edited by the real stages with few steps."""

import csv
import fcntl
import math
import shutil
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tasks.clip_stages import ClipStages
from tav.config.stages import STAGES
from tav.media.videos import read_mp4
from tav_cli import benchmark as runner
from tav_cli.benchmark import category_means
from tav_cli.main import main
from tav_model.errors import TavError
from tests.support.loveu_tgve import CATEGORIES, NAMES, write_benchmark
from tests.support.projects import ROOT

QUICK = {
    "decode.frames": 2,
    "decode.width": 64,
    "decode.height": 64,
    "tune.steps": 1,
    "invert.steps": 1,
    "edit.steps": 1,
    "runtime.device": "cpu",
    "runtime.edit_batch": 4,
    "tracking.uri": "null",
}
OUT = Path("results/benchmarks/tgve")


def options(**changes: object) -> list[str]:
    values = QUICK | {key.replace("__", "."): value for key, value in changes.items()}
    return [argument for key, value in values.items() for argument in ("--set", f"{key}={value}")]


def tav(monkeypatch: pytest.MonkeyPatch, root: Path, *arguments: str) -> int:
    """The exit code of `tav benchmark` in a project's folder."""
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "argv", ["tav", "benchmark", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


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
    shutil.copy(ROOT / "params.yaml", root)
    write_benchmark(root / "tgve")
    shutil.copy(root / "params.yaml", root / "tgve" / "params.before")
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert tav(monkeypatch, root, "tgve", *options()) == 0
    return root


@pytest.fixture
def project(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoilt."""
    return Path(shutil.copytree(finished, tmp_path / "project", symlinks=True))


def test_every_edit_and_its_scores(finished: Path):
    table = rows(finished)
    assert [(row["set"], row["clip"], row["category"]) for row in table] == [
        (of_set, name, category) for of_set, name in NAMES.items() for category in CATEGORIES
    ]
    assert table[1]["prompt"] == "a red cube is bouncing on the grass"
    for name in ("textual_alignment", "frame_consistency", "warping_error", "flicker"):
        assert all(math.isfinite(float(row[name])) for row in table)
    assert len({row["textual_alignment"] for row in table}) == 8


def test_table_by_category(finished: Path):
    lines = (finished / OUT / "results.md").read_text().splitlines()
    assert lines[0] == "# LOVEU-TGVE-2023: 2 of 2 clips, 8 edits"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert cells[0] == ["", *CATEGORIES, "all"] and cells[2] == ["edits", "2", "2", "2", "2", "8"]
    (alignment,) = [line for line in cells if line[0] == "textual_alignment"]
    table = rows(finished)
    for place, category in enumerate(CATEGORIES, 1):
        values = [float(row["textual_alignment"]) for row in table if row["category"] == category]
        assert alignment[place] == f"{statistics.fmean(values):.4f}"
    assert alignment[5] == f"{statistics.fmean(float(row['textual_alignment']) for row in table):.4f}"


def test_means_of_what_is_there():
    some, other = {"style": {"flicker": 0.5, "psnr": 20.0}}, {"style": {"flicker": 0.25}, "object": {"flicker": 0.0}}
    means = category_means([some, other])
    assert means["style"] == {"edits": 2, "flicker": 0.375, "psnr": 20.0}
    assert means["object"] == {"edits": 1, "flicker": 0.0}
    assert means["multiple"] == {"edits": 0}
    assert means["all"] == {"edits": 3, "flicker": 0.25, "psnr": 20.0}


def test_submission_is_as_the_benchmark_wants_it(finished: Path):
    images = ["00000.jpg", "00001.jpg"]
    wanted = {f"{of_set}/{name}/{category}": images for of_set, name in NAMES.items() for category in CATEGORIES}
    assert submission(finished) == dict(sorted(wanted.items()))
    for folder in wanted:
        of_set, name, category = folder.split("/")
        edits = finished / OUT / "work" / "results" / f"{of_set.lower()}-{name}" / "edits"
        frames = read_mp4(edits / f"{category}.mp4")[0]
        for frame, file in zip(frames, images, strict=True):
            with Image.open(finished / OUT / "submission" / folder / file) as image:
                assert (image.format, image.size, image.mode) == ("JPEG", (480, 480), "RGB")
                shrunk = np.asarray(image.resize((64, 64), Image.Resampling.BOX)).astype(float)
            assert np.abs(shrunk - frame).mean() < 6


def test_nothing_is_written_elsewhere(finished: Path):
    assert {path.name for path in finished.iterdir()} == {"params.yaml", "tgve", "results"}
    assert {path.name for path in (finished / "results" / "benchmarks").iterdir()} == {"tgve"}
    assert (finished / "params.yaml").read_text() == (finished / "tgve" / "params.before").read_text()
    assert {path.name for path in (finished / "tgve").iterdir()} == {
        *NAMES,
        "LOVEU-TGVE-2023_Dataset.csv",
        "params.before",
    }


def test_log_says_how_far_it_is(finished: Path):
    lines = (finished / OUT / "benchmark.log").read_text().splitlines()
    said = [line.partition(" ")[2] for line in lines]
    assert said[0] == "benchmark: 2 clips, 0 of them done before"
    assert said[1] == "DAVIS_480p/ball: begins"
    assert said[2].startswith("DAVIS_480p/ball: done; 1/2 clips, ") and said[2].endswith(" left")
    assert "0:00:00 left" not in said[2] and said[4].endswith(" s/clip, 0:00:00 left")


def test_a_second_run_renders_nothing(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    before = rows(project)
    ran = recording(monkeypatch)
    assert tav(monkeypatch, project, "tgve", *options()) == 0
    assert ran == [] and rows(project) == before
    out = capsys.readouterr().out
    assert "textual_alignment" in out and "to hand in: results/benchmarks/tgve/submission/" in out
    # Where the frames lie and how much is done at a time changes no result.
    (project / "tgve").rename(project / "elsewhere")
    assert tav(monkeypatch, project, "elsewhere", *options(runtime__decode_chunk=2)) == 0
    assert ran == []


def test_a_run_that_was_stopped_goes_on_and_keeps_no_old_scores(project: Path, monkeypatch: pytest.MonkeyPatch):
    changed = options(edit__guidance_scale=2.0)
    old = {row["clip"]: row["textual_alignment"] for row in rows(project)}
    with monkeypatch.context() as patch:
        ran = recording(patch, stop_at=("fish", "score"))
        assert tav(patch, project, "tgve", *changed) == 130
    # Tuned weights and inverted latents stand on no guidance scale.
    assert ran == [("ball", "edit"), ("ball", "score"), ("fish", "edit"), ("fish", "score")]
    assert {row["clip"] for row in rows(project)} == {"ball"} and rows(project)[3]["textual_alignment"] != old["ball"]
    assert {folder.partition("/")[0] for folder in submission(project)} == {"DAVIS_480p"}
    assert "Not in the table: youtube_480p/fish." in (project / OUT / "results.md").read_text()
    ran = recording(monkeypatch)
    assert tav(monkeypatch, project, "tgve", *changed) == 0
    assert ran == [("fish", "score")]
    assert len(rows(project)) == 8 and len(submission(project)) == 8


def test_a_broken_clip_fails_alone(project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    frame = project / "tgve" / "DAVIS_480p" / "480p_frames" / "ball" / "00002.jpg"
    whole = frame.read_bytes()
    frame.write_bytes(b"no picture")
    shutil.rmtree(project / OUT / "work" / "results" / "youtube_480p-fish" / "scores")
    ran = recording(monkeypatch)
    assert tav(monkeypatch, project, "tgve", *options()) == 1
    err = capsys.readouterr().err.splitlines()
    assert ran == [("ball", "decode"), ("fish", "score")]
    assert err[-2].startswith("error: DAVIS_480p/ball: ") and "00002.jpg: not an image that can be read" in err[-2]
    assert err[-1] == "1 of 2 clips failed; the same command tries them again"
    assert {row["clip"] for row in rows(project)} == {"fish"}
    assert {folder.partition("/")[0] for folder in submission(project)} == {"youtube_480p"}
    frame.write_bytes(whole)
    assert tav(monkeypatch, project, "tgve", *options()) == 0
    assert len(rows(project)) == len(submission(project)) == 8


def test_one_clip_alone(project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    ran = []

    def fails(folder: Path, clip: str, on_stage: object) -> None:
        ran.append((folder, clip))
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(runner, "run_clip", fails)
    assert tav(monkeypatch, project, "tgve", "--only", "youtube_480p/fish", *options(seed=7)) == 1
    assert ran == [(OUT / "work", "youtube_480p-fish")]
    err = capsys.readouterr().err
    assert "error: youtube_480p/fish: first line\n1 of 1 clips failed" in err
    # An error that is no user's mistake is in the log with where it came from.
    assert 'raise RuntimeError("first line' in (project / OUT / "benchmark.log").read_text()


def test_run_clip_needs_the_work_folder_and_a_name_alone(project: Path, monkeypatch: pytest.MonkeyPatch):
    work, clip = project / OUT / "work", "davis_480p-ball"
    (work / ".tav" / "benchmark" / f"{clip}.json").write_text("damaged")
    ran: list[str] = []
    monkeypatch.setattr(ClipStages, "run", lambda self, stage: ran.append(stage))
    scores = runner.run_clip(work, clip)
    assert ran == list(STAGES) and set(scores) == set(CATEGORIES)
    with pytest.raises(TavError, match="no clip named 'cat'"):
        runner.run_clip(work, "cat")


def test_models_of_the_project_are_found(project: Path, monkeypatch: pytest.MonkeyPatch):
    from toyworld import WEIGHTS

    (project / "models").mkdir()
    (project / "models" / "scorer").symlink_to(WEIGHTS / "scorer")
    ran = recording(monkeypatch)
    named = options(score__clip_model="models/scorer")
    assert tav(monkeypatch, project, "tgve", "--only", "DAVIS_480p/ball", *named) == 0
    assert ran == [("ball", "score")]
    assert (project / OUT / "work" / "models" / "scorer").is_symlink()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["nowhere"], "nowhere: no such folder"),
        (["tgve", "--only", "fish"], "--only: no clip 'fish'; must be SET/CLIP, one of: DAVIS_480p/ball, youtube_480"),
        (["tgve", "--set", "tune.steps"], "--set: 'tune.steps' is not allowed: must be KEY=VALUE"),
        (["tgve", "--set", "tune.step=3"], "override tune.step: unknown key; did you mean steps?"),
        (["tgve", "--set", "tune.steps=-1"], "tune.steps: -1 is not allowed: must be a whole number"),
        (["tgve", "--set", "clips.ball.caption=x"], "the clips are the benchmark's; --only chooses among them"),
        (["tgve", "--set", "base_model=missing"], "no model 'missing': it is neither a folder"),
        (["tgve", "--set", "runtime.device=cuda:99"], "runtime.device: 'cuda:99' is not usable here"),
    ],
)
def test_mistakes_are_refused_before_any_work(
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    error: str,
):
    monkeypatch.setattr(ClipStages, "run", lambda self, stage: pytest.fail(f"{stage} has run"))
    assert tav(monkeypatch, finished, *arguments, "--out", str(tmp_path / "out")) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert error in printed.err
    assert not (tmp_path / "out").exists()


def test_entries_that_leave_the_folder_are_refused(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    table = project / "tgve" / "LOVEU-TGVE-2023_Dataset.csv"
    table.write_text(table.read_text().replace("\nfish,", "\n../../secret,"))
    monkeypatch.setattr(ClipStages, "run", lambda self, stage: pytest.fail(f"{stage} has run"))
    assert tav(monkeypatch, project, "tgve", *options()) == 2
    assert "line 6: Video name: '../../secret' is not allowed" in capsys.readouterr().err


def test_one_benchmark_at_a_time(project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    with (project / OUT / ".lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert tav(monkeypatch, project, "tgve", *options()) == 2
    assert "another benchmark is running there" in capsys.readouterr().err


def test_terminals_get_a_bar_and_no_lines(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import io
    import os

    from rich.console import Console

    from tav.media.loveu_tgve import read_benchmark

    entries, screen = read_benchmark(finished / "tgve"), io.StringIO()
    monkeypatch.delenv("TAV_QUIET", raising=False)
    monkeypatch.setattr(runner, "Console", lambda stderr: Console(file=screen, force_terminal=True, width=120))
    with runner._Report(tmp_path / "log", entries, []) as report:
        assert os.environ["TAV_QUIET"] == "1"  # for the stages' own bars
        report.begins(entries[0])
        report.stage("tune", 30, 400)
        report._bar.refresh()
        report.done(entries[0])
        report.failed(entries[1], TavError("why"))
    assert "TAV_QUIET" not in os.environ
    assert "DAVIS_480p/ball: tune 30/400" in screen.getvalue() and "2/2" in screen.getvalue()
    log = (tmp_path / "log").read_text()
    assert "youtube_480p/fish: failed: why; 2/2 clips" in log and "1 clips up to date, 1 failed" in log
