"""`dvc repro` and `DvcPipeline` leave the same state, and each accepts what the other has done."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tav.config import load_params, no_own_settings, parse_params
from tav.versioning.dvc_pipeline import DvcPipeline
from tav_model.errors import TavError
from tests.support.dvc_project import (
    CLIPS,
    ROOT,
    STAGES,
    commit_all,
    contents,
    dvc,
    environment,
    git,
    make_project,
    run_stage,
    take_runs,
)

NEW = {"video": "data/ball.mp4", "caption": "c", "prompts": "data/man.csv", **no_own_settings()}
ALL = [(stage, clip) for clip in CLIPS for stage in STAGES]


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    """A project in which nothing has run, and one after `dvc repro`, to be copied."""
    folder = tmp_path_factory.mktemp("templates")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(folder).items():
            patch.setenv(name, value)
        fresh = make_project(folder / "fresh")
        done = shutil.copytree(fresh, folder / "done")
        dvc(done, "repro", "-q")
        assert len(take_runs(done)) == len(ALL)
        yield fresh, done


@pytest.fixture
def fresh(templates, tmp_path, monkeypatch):
    root = shutil.copytree(templates[0], tmp_path / "project")
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def done(templates, tmp_path, monkeypatch):
    root = shutil.copytree(templates[1], tmp_path / "project")
    monkeypatch.chdir(root)
    return root


def run(pipeline: DvcPipeline, stage: str, clip: str) -> None:
    before = pipeline.snapshot(stage, clip)
    run_stage(pipeline.root, stage, clip)
    pipeline.commit(stage, clip, before)


def bring_up_to_date(root: Path, clips=CLIPS) -> list[str]:
    """Do what a flow does, clip by clip, and return the stages that ran."""
    pipeline = DvcPipeline(root)
    for clip in clips:
        for stage in STAGES:
            if pipeline.is_current(stage, clip):
                continue
            if not pipeline.restore(stage, clip):
                run(pipeline, stage, clip)
            assert pipeline.is_current(stage, clip)
    return take_runs(root)


def change_clip(root: Path, clip: str, name: str, line: str) -> None:
    """Replace the line of a clip's own settings of one section."""
    text = (root / "params.yaml").read_text()
    above, below = text.split(f"  {clip}:\n")
    changed = re.sub(rf"^    {name}: .*$", f"    {line}", below, count=1, flags=re.MULTILINE)
    assert changed != below
    (root / "params.yaml").write_text(f"{above}  {clip}:\n{changed}")


def change(root: Path, old: str, new: str, file: str = "params.yaml") -> None:
    text = (root / file).read_text()
    assert old in text
    (root / file).write_text(text.replace(old, new))


# Together with `dvc repro`


def test_after_repro_there_is_nothing_to_do(done):
    before = contents(done)
    assert bring_up_to_date(done) == []
    assert contents(done) == before


def test_leaves_exactly_what_repro_leaves(fresh, templates):
    assert sorted(bring_up_to_date(fresh)) == sorted(f"{stage}@{clip}" for stage, clip in ALL)
    assert contents(fresh) == contents(templates[1])  # dvc.lock, outputs, .gitignore files, cache and run cache
    assert git(fresh, "status", "--short") == git(templates[1], "status", "--short")
    assert "up to date" in dvc(fresh, "status")
    dvc(fresh, "repro")
    assert take_runs(fresh) == []
    assert contents(fresh) == contents(templates[1])


def test_a_new_clip_is_appended_to_the_lock_file_as_by_repro(done, tmp_path):
    params = (done / "params.yaml").read_text()
    (done / "params.yaml").write_text(params.replace("clips:\n", "clips:\n  new: " + json.dumps(NEW) + "\n"))
    other = shutil.copytree(done, tmp_path / "other")
    dvc(other, "repro", "-q")
    assert bring_up_to_date(done, ["new"]) == [f"{stage}@new" for stage in STAGES] == take_runs(other)
    assert (done / "dvc.lock").read_bytes() == (other / "dvc.lock").read_bytes()


@pytest.mark.parametrize(
    ("old", "new", "stages"),
    [
        ("edit: {steps: 20", "edit: {steps: 30", ["edit", "score"]),
        ("spatial: [first, former]", "spatial: [first]", ["tune", "invert", "edit", "score"]),
    ],
)
def test_a_changed_parameter_runs_dependent_stages_and_changed_back_restores_them(done, old, new, stages):
    before = contents(done)
    change(done, old, new)
    assert bring_up_to_date(done, ["man-skiing_2"]) == [f"{stage}@man-skiing_2" for stage in stages]
    change(done, new, old)
    assert bring_up_to_date(done, ["man-skiing_2"]) == []
    after = contents(done)
    assert {name: after[name] for name in before} == before  # the run cache has grown


def test_repro_and_the_pipeline_restore_what_the_other_has_run(done):
    pipeline = DvcPipeline(done)
    edit = "edit: {steps: 2"
    change(done, f"{edit}0", f"{edit}1")
    for stage in ("edit", "score"):
        run(pipeline, stage, "ball")
    first = (done / "dvc.lock").read_bytes()
    change(done, f"{edit}1", f"{edit}2")
    dvc(done, "repro", "-q", "score@ball")
    second = (done / "dvc.lock").read_bytes()
    assert pipeline.is_current("score", "ball")
    assert take_runs(done) == ["edit@ball", "score@ball"] * 2

    change(done, f"{edit}2", f"{edit}1")
    dvc(done, "repro", "-q", "score@ball")
    assert (done / "dvc.lock").read_bytes() == first
    change(done, f"{edit}1", f"{edit}2")
    assert not pipeline.is_current("edit", "ball")
    assert pipeline.restore("edit", "ball") and pipeline.restore("score", "ball")
    assert (done / "dvc.lock").read_bytes() == second
    assert take_runs(done) == []


def test_parameters_of_one_clip_leave_the_others_alone(done):
    change(done, "caption: a ball", "caption: a cube")
    pipeline = DvcPipeline(done)
    stale = [f"{stage}@{clip}" for stage, clip in ALL if not pipeline.is_current(stage, clip)]
    assert stale == ["encode@ball", "score@ball"]
    change(done, "decode: {}", "decode: {start: 1}")
    assert not pipeline.is_current("decode", "ball")
    assert pipeline.is_current("decode", CLIPS[1])
    change(done, "device: auto", "device: cpu")  # of no section that DVC watches
    assert pipeline.is_current("tune", "ball")


@pytest.mark.parametrize(
    ("line", "reason", "stages"),
    [
        ("base_model: other", "base_model unset → other", ["encode", "tune", "invert", "edit"]),
        ("seed: 7", "seed unset → 7", ["tune", "edit"]),
        ("control: [{kind: canny, model: m}]", "control.0.kind unset → canny", ["annotate"]),
        ("decode: {start: 7}", "decode.start unset → 7", ["decode"]),
        ("attention: {temporal: false}", "attention.temporal unset → False", ["tune", "invert", "edit"]),
        ("encode: {precision: float16}", "encode.precision unset → float16", ["encode"]),
        ("tune: {steps: 7}", "tune.steps unset → 7", ["tune"]),
        ("invert: {steps: 7}", "invert.steps unset → 7", ["invert"]),
        ("edit: {steps: 7}", "edit.steps unset → 7", ["edit"]),
        ("score: {clip_model: other}", "score.clip_model unset → other", ["score"]),
    ],
)
def test_a_clips_own_setting_makes_its_stages_stale_and_no_others(done, line, reason, stages):
    change_clip(done, "ball", line.partition(":")[0], line)
    pipeline = DvcPipeline(done)
    stale = [(stage, clip) for stage, clip in ALL if not pipeline.is_current(stage, clip)]
    assert stale == [(stage, "ball") for stage in stages]
    for stage, status in pipeline.status("ball", stages).items():
        assert (status.state, status.reasons[0]) == ("stale", f"clips.ball.{reason}"), stage


def test_both_entry_points_run_the_stages_after_a_clips_own_setting(done, tmp_path):
    change_clip(done, "ball", "tune", "tune: {steps: 300}")
    other = shutil.copytree(done, tmp_path / "other")
    assert "clips.ball.tune" in dvc(other, "status") and "man-skiing_2" not in dvc(other, "status")
    dvc(other, "repro", "-q")
    ran = [f"{stage}@ball" for stage in ("tune", "invert", "edit", "score")]
    assert bring_up_to_date(done) == ran == take_runs(other)
    assert (done / "dvc.lock").read_bytes() == (other / "dvc.lock").read_bytes()
    # Without it, the results from before come back.
    change_clip(done, "ball", "tune", "tune: {}")
    assert bring_up_to_date(done) == []


@pytest.mark.slow
def test_an_experiment_changes_one_clip(done):
    commit_all(done)
    for scale in (2, 9):  # The key is new in the first, and there already in the second.
        dvc(done, "exp", "run", "-q", "-S", f"++clips.ball.edit.guidance_scale={scale}", "score@ball")
        assert take_runs(done) == ["edit@ball", "score@ball"]
        assert load_params(done / "params.yaml").for_clip("ball").edit.guidance_scale == scale
    assert "up to date" in dvc(done, "status")
    assert bring_up_to_date(done) == []


def test_a_common_setting_that_a_clip_replaces_does_not_concern_it(done):
    change_clip(done, "ball", "edit", "edit: {steps: 5}")
    assert bring_up_to_date(done) == ["edit@ball", "score@ball"]
    before = contents(done / "results")
    change(done, "edit: {steps: 20", "edit: {steps: 30")
    pipeline = DvcPipeline(done)
    assert pipeline.status("ball", ["edit"])["edit"].is_restorable
    assert not pipeline.status("man-skiing_2", ["edit"])["edit"].is_restorable
    assert bring_up_to_date(done, ["ball"]) == []
    assert contents(done / "results") == before
    assert "up to date" in dvc(done, "status", "score@ball")
    change(done, "edit: {steps: 30", "edit: {guidance_scale: 9.0, steps: 30")
    change(done, ", guidance_scale: 7.5", "")
    assert bring_up_to_date(done, ["ball"]) == ["edit@ball", "score@ball"]


def without_own_settings(text: str) -> str:
    """Return params.yaml or dvc.lock as versions wrote it in which a clip could have settings of `decode` alone."""
    names = "|".join(name for name in no_own_settings() if name != "decode")
    text = re.sub(r"^( {8})?window:\s+(\{context_length: null\}|context_length:)\n", "", text, flags=re.MULTILINE)
    return re.sub(rf"^    ( +clips\.[\w-]+\.)?({names}): *(null|\{{\}})?\n", "", text, flags=re.MULTILINE)


def test_results_of_earlier_versions_stay_valid(done):
    before = contents(done)
    for name in ("params.yaml", "dvc.lock"):
        text = (done / name).read_text()
        (done / name).write_text(without_own_settings(text))
        assert (done / name).read_text().count("\n") <= text.count("\n") - 16
    pipeline = DvcPipeline(done)
    assert {status.state for status in pipeline.status("ball", STAGES).values()} == {"up to date"}
    assert "up to date" in dvc(done, "status")
    assert bring_up_to_date(done) == []
    after = contents(done)
    assert load_params(done / "params.yaml") == parse_params("params.yaml", before["params.yaml"].decode())
    for content in (before, after):
        content.pop("params.yaml")  # The keys are in another order.
    assert after == before


def test_what_changed_since_an_earlier_version_is_run(done):
    for name in ("params.yaml", "dvc.lock"):
        (done / name).write_text(without_own_settings((done / name).read_text()))
    shutil.rmtree(done / "results")  # as in a clone before the first pull
    assert bring_up_to_date(done, ["man-skiing_2"]) == []
    change(done, "tune: {steps: 60", "tune: {steps: 70")
    assert bring_up_to_date(done, ["ball"]) == [f"{stage}@ball" for stage in ("tune", "invert", "edit", "score")]


def without_watched_folders(text: str) -> str:
    """Return dvc.lock as of the versions in which no stage depended on the folders of masks and conditions."""
    return re.sub(r"^    - path: data/(masks|conditions)\n(      .*\n)+", "", text, flags=re.MULTILINE)


def without_control(root: Path) -> None:
    """Make a project one of the versions that had no stage `annotate`, except for dvc.yaml."""
    text = (root / "dvc.lock").read_text()
    text = re.sub(r"^  annotate@.*\n(    .*\n)+", "", text, flags=re.MULTILINE)
    text = re.sub(r"^    - path: results/[\w-]+/control/.*\n(      .*\n)+", "", text, flags=re.MULTILINE)
    assert "control" not in text and text.count("@") == 2 * (len(STAGES) - 1)
    (root / "dvc.lock").write_text(text)
    params = (root / "params.yaml").read_text()
    (root / "params.yaml").write_text(re.sub(r"^ *control: .*\n", "", params, flags=re.MULTILINE))
    for clip in CLIPS:
        shutil.rmtree(root / f"results/{clip}/control")


def test_results_from_before_the_stage_annotate_stay_valid(done):
    before = contents(done)
    without_control(done)
    pipeline = DvcPipeline(done)
    assert {status.state for status in pipeline.status("ball", STAGES).values()} == {"up to date"}
    assert "up to date" in dvc(done, "status")
    assert bring_up_to_date(done) == []
    after = contents(done)
    for content in (before, after):
        content.pop("params.yaml")  # The keys are in another order.
    assert after == before
    change(done, "control: []", "control: [{kind: canny, model: m}]")
    ran = [f"{stage}@ball" for stage in ("annotate", "invert", "edit", "score")]
    assert bring_up_to_date(done, ["ball"]) == ran


def test_a_clone_of_an_earlier_version_needs_no_outputs_to_be_brought_up_to_date(done):
    without_control(done)
    # As versions before that had it, and set already by the user.
    (done / "dvc.lock").write_text(without_own_settings((done / "dvc.lock").read_text()))
    shutil.rmtree(done / "results")
    change(done, "seed: 33", "seed: 33\ncontrol: [{kind: canny, model: m, stages: [edit]}]")
    assert bring_up_to_date(done, ["ball"]) == [f"{stage}@ball" for stage in ("annotate", "edit", "score")]
    change_clip(done, "man-skiing_2", "control", "control: []")
    assert bring_up_to_date(done, ["man-skiing_2"]) == []


def test_results_from_before_the_folders_of_masks_and_conditions_stay_valid(done):
    before = (done / "dvc.lock").read_text()
    text = without_watched_folders(before)
    assert before.count("path: data/masks") == before.count("path: data/conditions") == len(CLIPS)
    assert "data/masks" not in text and "data/conditions" not in text
    (done / "dvc.lock").write_text(text)
    assert {status.state for status in DvcPipeline(done).status("ball", STAGES).values()} == {"up to date"}
    assert "up to date" in dvc(done, "status")
    assert (done / "dvc.lock").read_text() == before


def test_results_from_before_the_stage_annotate_and_the_folders_stay_valid(done):
    before = contents(done)
    without_control(done)
    (done / "dvc.lock").write_text(without_watched_folders((done / "dvc.lock").read_text()))
    assert bring_up_to_date(done) == []
    after = contents(done)
    # No entry of the run cache lacks an input.
    kept = [
        {name: text for name, text in one.items() if "/runs/" in name or name == "dvc.lock"} for one in (before, after)
    ]
    assert len(kept[0]) > len(CLIPS) and kept[1] == kept[0]


def test_masks_and_conditions_rerun_the_stages_that_read_them(done):
    (done / "data/masks/ball.png").write_text("mask")
    assert bring_up_to_date(done, ["ball"]) == ["edit@ball"]  # Its outputs are the same here.
    (done / "data/conditions/depth.mp4").write_text("depth")
    assert bring_up_to_date(done, ["ball"]) == ["annotate@ball"]
    (done / "data/masks/ball.png").unlink()
    assert bring_up_to_date(done, ["ball"]) == []  # The result without the mask is restored.


def test_control_reruns_the_stages_that_it_acts_in(done):
    one = "{kind: canny, model: m, scale: 1.0}"
    change(done, "control: []", f"control: [{one}]")
    assert bring_up_to_date(done, ["ball"]) == [f"{stage}@ball" for stage in ("annotate", "invert", "edit", "score")]
    change_clip(done, "ball", "control", "control: [{kind: canny, model: m, scale: 1.0, stages: [edit]}]")
    # The inversion without control is restored.
    assert bring_up_to_date(done, ["ball"]) == [f"{stage}@ball" for stage in ("annotate", "edit", "score")]
    change_clip(done, "ball", "control", "control: [{kind: canny, model: m, scale: 0.5, stages: [edit]}]")
    assert bring_up_to_date(done, ["ball"]) == [f"{stage}@ball" for stage in ("annotate", "edit", "score")]
    change_clip(done, "ball", "control", "control: []")
    assert bring_up_to_date(done, ["ball"]) == ["annotate@ball"]  # Without control there is one result, the first.


# Restoring


@pytest.mark.parametrize("lost", ["results/ball", "results/ball/edits", "results/ball/scores/metrics.json"])
def test_lost_outputs_are_restored(done, lost):
    before = contents(done)
    path = done / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert bring_up_to_date(done, ["ball"]) == []
    assert contents(done) == before


def test_damaged_outputs_are_restored(done):
    before = contents(done)
    (done / "results/ball/edits/a.mp4").write_text("damaged")
    (done / "results/ball/edits/stray.mp4").write_text("not of this stage")
    pipeline = DvcPipeline(done)
    assert not pipeline.is_current("edit", "ball")
    assert pipeline.restore("edit", "ball")
    assert contents(done) == before


def test_what_another_machine_pushed_is_pulled_and_restored(done, tmp_path, monkeypatch):
    dvc(done, "remote", "add", "-q", "-d", "store", str(tmp_path / "store"))
    commit_all(done)
    dvc(done, "push", "-q")
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(done), str(clone))
    dvc(clone, "pull", "-q")
    monkeypatch.chdir(clone)
    assert bring_up_to_date(clone, ["ball"]) == []
    shutil.rmtree(clone / "results/ball")
    assert bring_up_to_date(clone, ["ball"]) == []
    assert git(clone, "status", "--short") == ""


def test_nothing_to_restore_leaves_all_as_it_was(done):
    change(done, "edit: {steps: 20", "edit: {steps: 31")
    before = contents(done)
    assert not DvcPipeline(done).restore("edit", "ball")
    assert contents(done) == before


def test_outputs_that_the_cache_has_lost_are_not_restored(done):
    shutil.rmtree(done / ".dvc/cache/files")
    pipeline = DvcPipeline(done)
    assert not pipeline.is_current("decode", "ball")  # as DVC sees it: "not in cache"
    assert not pipeline.restore("decode", "ball")
    assert (done / "results/ball/frames/source.mp4").exists()


# What must not be recorded


@pytest.mark.parametrize(
    ("file", "old", "new", "named"),
    [
        ("params.yaml", "edit: {steps: 20", "edit: {steps: 25", "params.yaml: edit"),
        ("data/ball.csv", "ball", "other", "data/ball.csv"),
        ("dvc.yaml", "python -m tasks edit", "python -u -m tasks edit", "its command"),
    ],
)
def test_inputs_that_changed_meanwhile_are_refused(done, file, old, new, named):
    change(done, "edit: {steps: 20", "edit: {steps: 20, start: random")
    lock = (done / "dvc.lock").read_bytes()
    pipeline = DvcPipeline(done)
    before = pipeline.snapshot("edit", "ball")
    run_stage(done, "edit", "ball")
    change(done, old, new, file)
    with pytest.raises(TavError, match=f"edit@ball: changed while the stage was running: {named};"):
        pipeline.commit("edit", "ball", before)
    assert (done / "dvc.lock").read_bytes() == lock
    assert not pipeline.is_current("edit", "ball")
    assert not pipeline.restore("edit", "ball")


def test_a_stage_that_left_no_output_is_not_recorded(fresh):
    pipeline = DvcPipeline(fresh)
    before = pipeline.snapshot("decode", "ball")
    with pytest.raises(TavError, match=r"decode@ball: output 'results/ball/frames' does not exist"):
        pipeline.commit("decode", "ball", before)
    assert not (fresh / "dvc.lock").exists()


# Other processes and threads


def test_a_running_repro_is_waited_for_and_named(done):
    change(done, "tune: {steps: 60", "tune: {steps: 61")
    repro = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro", "-q"],
        env={**os.environ, "SLOW_STAGE": "tune"},
        start_new_session=True,
    )
    try:
        end = time.monotonic() + 30
        while not (done / "ran.log").exists():
            assert time.monotonic() < end
            time.sleep(0.05)
        pipeline = DvcPipeline(done, wait=0)
        assert pipeline.is_current("decode", "ball")  # DVC locks what the stage reads and writes, nothing else
        with pytest.raises(
            TavError, match=rf"^tune@ball: DVC is in use here by process {repro.pid} \(.*dvc repro -q\)"
        ):
            pipeline.is_current("tune", "ball")
    finally:
        os.killpg(repro.pid, signal.SIGKILL)
        repro.wait()
    assert not pipeline.is_current("tune", "ball")
    assert not pipeline.restore("tune", "ball")
    run(pipeline, "tune", "ball")
    assert pipeline.is_current("tune", "ball")


PAUSED_COMMIT = """
import sys, time
from pathlib import Path
from tav.config import load_params, no_own_settings, parse_params
from tav.versioning.dvc_pipeline import DvcPipeline
from dvc.stage.cache import StageCache

def stop(*_):
    print("paused", flush=True)
    time.sleep(60)

StageCache.save = stop
pipeline = DvcPipeline(Path.cwd())
pipeline.commit("edit", "ball", pipeline.snapshot("edit", "ball"))
"""


def test_a_commit_that_is_killed_leaves_no_lock(done, monkeypatch):
    change(done, "edit: {steps: 20", "edit: {steps: 22")
    assert not DvcPipeline(done).is_current("edit", "ball")
    run_stage(done, "edit", "ball")
    lock = (done / "dvc.lock").read_bytes()
    script = subprocess.Popen(
        [sys.executable, "-c", PAUSED_COMMIT],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert script.stdout.readline() == "paused\n"
        monkeypatch.setattr("dvc.lock.DEFAULT_TIMEOUT", 0.3)  # the seconds that DVC itself waits
        with pytest.raises(TavError, match=rf"^decode@ball: DVC is in use here by process {script.pid} \("):
            DvcPipeline(done, wait=0).is_current("decode", "ball")
    finally:
        script.kill()
        script.wait()
        script.stdout.close()
    assert (done / "dvc.lock").read_bytes() == lock
    begin = time.monotonic()
    assert bring_up_to_date(done, ["ball"]) == ["edit@ball", "edit@ball", "score@ball"]
    assert time.monotonic() - begin < 10
    assert "up to date" in dvc(done, "status", "score@ball")


def test_waits_for_the_lock(done, monkeypatch):
    pipeline = DvcPipeline(done, wait=30)
    assert pipeline.is_current("decode", "ball")
    import zc.lockfile

    monkeypatch.setattr("dvc.lock.DEFAULT_TIMEOUT", 0.3)  # the seconds that DVC itself waits
    held = zc.lockfile.LockFile(str(done / ".dvc/tmp/lock"))
    release = threading.Timer(1, held.close)
    release.start()
    begin = time.monotonic()
    assert pipeline.is_current("decode", "ball")
    assert time.monotonic() - begin > 0.9
    release.join()


def test_a_thread_waits_for_another_for_as_long_as_it_takes(done, monkeypatch):
    pipeline = DvcPipeline(done, wait=0)
    before = pipeline.snapshot("edit", "ball")
    from dvc.stage.cache import StageCache

    saving = threading.Event()
    save = StageCache.save

    def save_slowly(self, stage):
        saving.set()
        time.sleep(1)
        save(self, stage)

    monkeypatch.setattr(StageCache, "save", save_slowly)
    monkeypatch.setattr("dvc.lock.DEFAULT_TIMEOUT", 0.3)  # the seconds that DVC itself waits
    with ThreadPoolExecutor(1) as pool:
        committed = pool.submit(pipeline.commit, "edit", "ball", before)
        assert saving.wait(10)
        assert pipeline.is_current("score", "ball")
        assert committed.result() is None


# As a library


NOISE = """
import io, logging, shutil, sys
from pathlib import Path
sys.stdout = io.StringIO()
streams = sys.stdout, sys.stderr
from tav.config import load_params, no_own_settings, parse_params
from tav.versioning.dvc_pipeline import DvcPipeline
assert "dvc" not in sys.modules
pipeline = DvcPipeline(Path.cwd())
shutil.rmtree("results/ball/frames")
assert pipeline.restore("decode", "ball")
pipeline.commit("decode", "ball", pipeline.snapshot("decode", "ball"))
assert (sys.stdout, sys.stderr) == streams
assert sys.stdout.getvalue() == ""
assert logging.getLogger("dvc").handlers == []
assert logging.getLogger("asyncio").level == logging.NOTSET
"""


def test_prints_nothing_even_on_a_terminal(done):
    reader, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 25, 80, 0, 0))  # room for a progress bar
    script = subprocess.Popen(
        [sys.executable, "-c", NOISE], env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=terminal
    )
    os.close(terminal)
    output = b""
    with contextlib.suppress(OSError), open(reader, "rb", buffering=0) as screen:  # a closed terminal is an OSError
        while data := screen.read(1000):
            output += data
    assert script.wait() == 0
    assert output.replace(b"\x1b[0m", b"") == b""  # the reset of colours at the end of a process is invisible


def test_looking_at_six_stages_takes_well_under_two_seconds(done):
    pipeline = DvcPipeline(done)
    pipeline.is_current("decode", "ball")  # imports DVC
    begin = time.monotonic()
    assert all(pipeline.is_current(stage, "ball") for stage in STAGES)
    assert time.monotonic() - begin < 2


def test_ignored_results_need_no_other_ignore_files(fresh):
    (fresh / ".gitignore").write_text("/results/\n/ran.log\n__pycache__/\n")
    commit_all(fresh)
    bring_up_to_date(fresh, ["ball"])
    assert not list(fresh.glob("results/**/.gitignore"))
    assert git(fresh, "status", "--short") == "?? dvc.lock\n"


def test_autostage_is_heeded(fresh):
    (fresh / ".dvc/config.local").write_text("[core]\n    autostage = true\n")
    run(DvcPipeline(fresh), "decode", "ball")
    assert git(fresh, "diff", "--cached", "--name-only").split() == ["dvc.lock", "results/ball/.gitignore"]


# Errors


def test_errors_are_one_line(fresh, monkeypatch):
    pipeline = DvcPipeline(fresh)

    def message(stage="decode", clip="ball"):
        with pytest.raises(TavError) as caught:
            pipeline.snapshot(stage, clip)
        text = str(caught.value)
        assert "\n" not in text and text.startswith(f"{stage}@{clip}: ")
        return text

    assert "'decode@cube' not found" in message(clip="cube")
    assert "dependency 'results/ball/frames' does not exist" in message("encode")
    assert not pipeline.is_current("encode", "ball")
    params = (fresh / "params.yaml").read_text()
    (fresh / "params.yaml").write_text(params.replace("    decode: {}\n", ""))
    assert "clips.ball.decode" in message()
    (fresh / "params.yaml").write_text("clips: [")
    assert "params.yaml" in message()
    (fresh / "params.yaml").write_text(params)
    (fresh / "dvc.lock").write_text("stages: [")
    assert "dvc.lock" in message()


def test_not_a_project_or_not_in_it(fresh, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TavError, match="must be the current folder"):
        DvcPipeline(fresh).is_current("decode", "ball")
    with pytest.raises(TavError, match="no folder"):
        DvcPipeline(tmp_path).is_current("decode", "ball")
    shutil.copytree(fresh / ".dvc", tmp_path / ".dvc")
    with pytest.raises(TavError, match="not a git repository"):
        DvcPipeline(tmp_path).is_current("decode", "ball")
