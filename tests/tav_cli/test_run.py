"""`tav run`: what it brings up to date, what it reports, and how it is stopped."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

import flows.tav  # noqa: F401 (Prefect's handlers keep the stderr that they begin with, which must not be that of a test)
from tasks.clip_stages import ClipStages
from tav.config import AttentionParams, EditParams, InvertParams, TuneParams, load_params, write_overrides
from tav.config.stages import STAGES
from tav.reports import report as reports
from tav.runtime.events import ClipFinished, StageFailed, StageStarted, StageUpToDate
from tav.versioning.dvc_pipeline import DvcPipeline
from tav_cli import run as runner
from tav_model.errors import TavError
from tests.support.tav_command import Ended, Tav, contents, read_yaml, start_tav


def prefect_runs(project: Path, kind: str) -> list[tuple[str, str, str, str]]:
    """Name, type and name of the state, and its message, of all runs in the project's own Prefect, in their order."""
    query = (
        f"SELECT run.name, state.type, state.name, state.message FROM {kind}_run AS run "  # noqa: S608
        f"JOIN {kind}_run_state AS state ON state.id = run.state_id ORDER BY run.created"
    )
    with contextlib.closing(sqlite3.connect(project / ".tav/prefect/prefect.db")) as database:
        return database.execute(query).fetchall()


def test_run_brings_up_to_date_what_it_can(ran: tuple[Path, Ended]) -> None:
    project, ended = ran
    assert ended.code == 1, ended.err
    result = json.loads(ended.out)["clips"]
    ball, cube = result["ball"], result["cube"]
    assert ball["stages"] == dict.fromkeys(STAGES, "done") and ball["error"] is None
    assert set(ball["edits"]) == {"blue", "cube"}
    for path in (*(edit["video"] for edit in ball["edits"].values()), ball["picture"], ball["report"]):
        assert (project / path).is_file()
    assert ball["scores"].keys() == ball["edits"]["blue"]["scores"].keys() >= {"flicker", "warping_error"}
    assert cube["stages"] == {} and "not a video that can be read" in cube["error"]
    lines = ended.err.splitlines()
    assert [line.partition(" done in ")[0] for line in lines if " done in " in line and line.startswith("ball: ")] == [
        f"ball: {stage}" for stage in STAGES
    ]
    assert lines[-2].startswith("error: cube: ") and lines[-1] == "1 of 2 clips failed; see logs/run.log"
    assert "not a video that can be read" in (project / "logs/run.log").read_text()
    assert "|" not in ended.err and "Traceback" not in ended.err  # Prefect's log lines have bars
    assert "Finished in state Failed" in (project / "logs/run.log").read_text()


def test_each_project_has_a_prefect_database_of_its_own(ran: tuple[Path, Ended], isolated: Path) -> None:
    project, _ = ran
    ((_, state, *_),) = prefect_runs(project, "flow")
    assert state == "FAILED"  # a clip failed
    assert not list(isolated.glob(".prefect/*.db"))


def test_run_knows_when_there_is_nothing_to_do(tav: Tav, done: Path) -> None:
    before = contents(done)
    ended = tav("run", "ball", "ball")
    assert ended.code == 0 and ended.err == "ball: up to date\n"
    rows = [line.split()[0] for line in ended.out.splitlines() if line.strip(" ─")]
    assert rows == ["warping", "ball", "(source)", "blue", "cube", "(mean)", "videos", "picture", "report"]
    assert "report   results/ball/report.html" in ended.out
    assert contents(done) == before
    pages = ("results/ball/report.html", "results/index.html")  # The only files that tell the time.
    (done / pages[0]).write_text("of other results")  # As where DVC has restored the present ones.
    tav("run", "ball")
    after = contents(done)
    assert b"a blue ball" in after[pages[0]]
    assert after | {page: before[page] for page in pages} == before
    quiet = tav("run", "ball", "--quiet")
    assert quiet == (0, "", "")
    as_json = tav("run", "ball", "--quiet", "--json")
    assert as_json.err == "" and json.loads(as_json.out)["clips"]["ball"]["scores"]
    # What is there already is no change.
    assert tav("run", "ball", "--set", "tune.steps=2", "--prompts", done / "data/ball.csv").code == 0


def test_run_names_words_that_the_model_does_not_know(tav: Tav, done: Path) -> None:
    (done / "data/ball.csv").write_text("name,prompt\nblue,a blue zebra\ncube,a red cube on the moon\n")
    ended = tav("run", "ball", "--set", "runtime.device=cuda:99")  # refused afterwards
    assert ended.err.startswith('warning: ball: toyworld does not know "zebra" or "moon"; it knows a ball, ')
    assert len(ended.err.splitlines()) == 2
    assert ClipStages(done, "ball").unknown_words_warning() == ended.err.splitlines()[0].removeprefix("warning: ball: ")
    assert tav("run", "ball", "--set", "runtime.device=cuda:99", "-q").err.startswith("error: ")


def test_run_names_what_has_failed(tav: Tav, done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows_fail(root: Path, clips: list[str], overrides: dict[str, Any], progress: Any) -> None:
        assert (clips, overrides) == (["ball", "cube"], {"edit.steps": "2"})
        for stage in STAGES[:5]:
            progress(StageUpToDate(clip="ball", stage=stage))
        progress(StageStarted(clip="ball", stage="edit"))
        for stage in STAGES:  # The clips run side by side.
            progress(StageUpToDate(clip="cube", stage=stage))
        progress(ClipFinished(clip="cube", stage=""))
        progress(StageFailed(clip="ball", stage="edit", error=TavError("why")))
        progress(ClipFinished(clip="ball", stage="", error="edit: 1 of 2 rows failed: blue (why). 1 done and kept"))

    monkeypatch.setattr(runner, "_run_flow", rows_fail)
    shutil.copytree(done / "results/ball", done / "results/cube")
    ended = tav("run", "--set", "edit.steps=2")
    assert ended.code == 1
    assert ended.out.splitlines()[2].split()[0] == "cube" and "(mean)" in ended.out
    assert ended.err.splitlines() == [
        "ball: decode, encode, annotate, tune, invert up to date",
        "cube: up to date",
        "error: ball: edit: 1 of 2 rows failed: blue (why). 1 done and kept",
        "1 of 2 clips failed; see logs/ball/edit.log",
    ]
    monkeypatch.setattr(runner, "_run_flow", lambda *_: "no Prefect server can be started")
    assert tav("run", "--set", "edit.steps=2") == (1, "", "error: no Prefect server can be started\n")


def test_run_says_when_its_server_has_gone(tav: Tav, done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flow(*_: Any, **__: Any) -> None:
        raise httpx.ConnectError("All connection attempts failed")

    monkeypatch.setattr(runner, "serving_api", lambda _: "http://127.0.0.1:9/api")
    monkeypatch.setattr("flows.tav.tav", flow)
    ended = tav("run", "ball", "--set", "edit.steps=2")
    assert (ended.code, ended.out) == (1, "")
    # In this process, Prefect was imported before the command could silence it on the terminal.
    assert ended.err.endswith(
        "error: Prefect's server no longer answers; what is done is kept, so run it again; "
        "see logs/run.log and logs/run-prefect-server.log\n"
    )
    assert "All connection attempts failed" in (done / "logs/run.log").read_text()


def test_run_sets_parameters_of_its_clips_or_of_all(tav: Tav, done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(runner, "_run_flow", lambda root, clips, overrides, progress: asked.append(overrides))
    ended = tav("run", "ball", "--set", "edit.steps=2", "--set", "runtime.edit_batch=3", "--set-all", "seed=7")
    assert ended.code == 0, ended.err
    assert asked.pop() == {"clips.ball.edit.steps": "2", "runtime.edit_batch": "3", "seed": "7"}
    shared = "runtime.edit_batch: changed for all clips, because clips have no runtime.edit_batch of their own\n"
    assert shared in ended.err
    write_overrides(done / "params.yaml", {"clips.ball.edit.steps": 3, "clips.ball.base_model": "toyworld/."})
    for arguments in (["--set-all", "edit.steps=5"], ["--set-all", "edit={steps: 5}"]):
        ended = tav("run", "ball", *arguments)
        assert "ball: keeps its own edit.steps, 3 (clips.ball.edit.steps in params.yaml)\n" in ended.err
        assert "base_model" not in ended.err
    assert "keeps" not in tav("run", "ball", "--set-all", "tune.steps=5").err
    assert "keeps" not in tav("run", "cube", "--set-all", "edit.steps=5").err
    assert tav("run", "ball", "--set", "edit.step=2").error == (
        "error: params.yaml: override edit.step: unknown key; did you mean steps? "
        f"(allowed: {', '.join(EditParams.model_fields)})\n"
    )
    assert "edit.guidance_scale: 500 is not allowed" in tav("run", "ball", "--set", "edit.guidance_scale=500").error
    assert tav("run", "ball", "--set", "steps=2").error == (
        "error: params.yaml: override steps: unknown key; did you mean tune.steps or invert.steps or edit.steps?\n"
    )
    assert "--set-all: 'x' is not allowed" in tav("run", "--set-all", "x").error
    assert "no model 'none'" in tav("run", "ball", "--set", "base_model=none").error


def test_run_refuses_masks_that_are_missing_or_none(tav: Tav, done: Path) -> None:
    before = contents(done)
    ended = tav("run", "ball", "--set", "edit.mask=data/none.png")
    assert (ended.code, ended.error) == (2, "error: params.yaml: edit.mask: data/none.png: no such file\n")
    assert contents(done) == before
    (done / "data/ball.csv").write_text("prompt,mask\na blue ball,words\na red cube,data/none.png\n")
    ended = tav("run", "ball")
    assert (ended.code, ended.error) == (2, "error: data/ball.csv: line 3: mask: data/none.png: no such file\n")
    (done / "data/none.png").write_bytes(b"no image")
    ended = tav("run", "ball")
    assert ended.code == 2 and "error: data/ball.csv: line 3: mask: data/none.png: not an image that" in ended.error


def test_the_papers_settings_are_one_option(tav: Tav, done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(runner, "_run_flow", lambda root, clips, overrides, progress: asked.append(overrides))
    ended = tav("run", "ball", "--paper", "--set", "edit.steps=7")
    assert ended.code == 0, ended.err
    before = load_params(done / "params.yaml")
    after = load_params(done / "params.yaml", asked.pop())
    ball, cube = after.for_clip("ball"), after.for_clip("cube")
    assert ball.tune == TuneParams(precision=before.tune.precision)
    assert ball.invert == InvertParams(precision=before.invert.precision, trajectory=before.invert.trajectory)
    assert ball.edit == EditParams(precision=before.edit.precision, steps=7)
    assert ball.attention == AttentionParams() and ball.decode == before.for_clip("ball").decode
    unchanged = before.for_clip("cube")
    assert (cube.tune, cube.invert, cube.edit) == (unchanged.tune, unchanged.invert, unchanged.edit)


def test_run_of_a_clip_in_use_is_refused_at_once(tav: Tav, done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(runner, "_run_flow", lambda root, clips, overrides, progress: asked.append(clips))
    monkeypatch.setattr(DvcPipeline, "is_current", lambda *_: False)
    in_use = f"is in use by process {os.getpid()} (stage tune); wait for it"
    with ClipStages(done, "ball").prepared("tune", "tune"):
        assert tav("run", "ball", "--set", "edit.steps=9").error == f"error: run: the clip ball {in_use}\n"
        assert asked == []
        shutil.copytree(done / "results/ball", done / "results/cube")
        tav("run", "ball", "cube")  # The other one is free.
        assert asked == [["ball", "cube"]]
    assert "steps: 9" not in (done / "params.yaml").read_text()


def test_a_report_that_fails_fails_no_run(
    tav: Tav, done: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def write_report(root: Path, clip: str) -> Path:
        raise TavError("no room")

    monkeypatch.setattr(reports, "write_report", write_report)
    (done / "results/ball/report.html").unlink()
    ended = tav("run", "ball")
    assert ended.code == 0 and "report   not written yet; run tav report ball" in ended.out
    assert ended.err == "ball: up to date\n"
    assert caplog.messages == ["no report of ball: no room"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["cat"], "no clip named 'cat'; there are: ball, cube"),
        (["--set", "tune.steps"], "--set: 'tune.steps' is not allowed: must be KEY=VALUE"),
        (["--set", "tune.step=3"], "override tune.step: unknown key; did you mean steps?"),
        (["--set", "tune.steps=-1"], "tune.steps: -1 is not allowed: must be a whole number"),
        (["--set", "clips.ball.caption= "], "clips.ball.caption: '' is not allowed"),
        (["--set", "runtime.device=cuda:99"], "runtime.device: 'cuda:99' is not usable here"),
        (["--set", "base_model=missing"], "no model 'missing': it is neither a folder"),
        (
            ["--set", "base_model=data/empty"],
            "data/empty: not a base model in diffusers' layout: no folder scheduler, ",
        ),
        (
            ["--set", "control=[{kind: canny, model: models/none}]"],
            "params.yaml: control.0.model: no model 'models/none'",
        ),
        (["--set", "control=[{kind: canny}]"], "params.yaml: control.0.model: is missing"),
        (["--set", "clips.ball.video=data/none.mp4"], "data/none.mp4: no such file; it is the video of ball"),
        (["ball", "--prompts", "data/none.csv"], "data/none.csv: no such file"),
        (["ball", "--prompts", "params.yaml"], "params.yaml: line 1: unknown column"),
        (["ball", "--prompts", "/etc/passwd"], "--prompts: '/etc/passwd' is outside the project"),
        (["ball", "--prompts", "data/../../x.csv"], "--prompts: 'data/../../x.csv' is outside the project"),
    ],
)
def test_run_refuses_mistakes_before_any_work(tav: Tav, new: Path, arguments: list[str], error: str) -> None:
    (new / "data/empty").mkdir()
    before = contents(new)
    ended = tav("run", *arguments)
    assert ended.code == 2 and error in ended.error
    assert contents(new) == before


def test_run_refuses_the_scale_of_a_control_that_there_is_not(tav: Tav, new: Path) -> None:
    (new / "data/ball.csv").write_text("prompt,control_scale\na blue ball,0.5\n")
    refused = tav("run", "ball")
    assert refused.code == 2 and "data/ball.csv: line 2: control_scale: the clip ball has no control" in refused.error


@pytest.mark.timeout(200)
def test_run_is_stopped_by_an_interrupt_and_nothing_is_left_running(
    tav: Tav, done: Path, isolated: Path, tmp_path: Path
) -> None:
    checkpoints = done / ".tav" / "checkpoints" / "ball"
    with (tmp_path / "err").open("w") as err:
        process = start_tav(done, isolated, "run", "ball", "--set", "tune.steps=90000", stderr=err, stdout=err)
    deadline = time.monotonic() + 150
    while not any(checkpoints.glob("step-*")):
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "err").read_text()
        time.sleep(0.2)
    (server,) = [
        child for child in psutil.Process(process.pid).children() if "flows.temporary_server" in child.cmdline()
    ]
    os.killpg(process.pid, signal.SIGINT)  # As a terminal sends it, to all of the foreground.
    assert process.wait(60) == 130
    lines = (tmp_path / "err").read_text().splitlines()
    assert lines[0] == "ball: decode, encode, annotate up to date"
    assert lines[-1] == "stopped; run the same command again to resume" and "Traceback" not in " ".join(lines)
    assert "stopping after the present step; what is done is kept" in " ".join(lines)
    assert psutil.wait_procs([server], timeout=30)[1] == []
    message = "interrupted; the next run resumes where this one stopped"
    assert prefect_runs(done, "flow")[-1][1:] == ("CANCELLED", "Cancelled", message)
    states = {name: rest for name, *rest in prefect_runs(done, "task")}
    assert states["tune: ball"] == ["CANCELLED", "Cancelled", message]
    assert "Crash" not in (done / "logs/run.log").read_text()
    params = read_yaml(done / "params.yaml")
    assert params["clips"]["ball"]["tune"] == {"steps": 90000} and params["tune"]["steps"] == 2
    step = max(int(path.stem.removeprefix("step-")) for path in checkpoints.glob("step-*"))
    resumes = f"resumes from the checkpoint of step {step} of 90000"
    assert f"clips.ball.tune.steps unset → 90000; {resumes}" in " ".join(tav("status", "ball").out.split())
    # Of other settings there is no checkpoint.
    (done / "params.yaml").write_text((done / "params.yaml").read_text().replace("90000", "90001"))
    assert "checkpoint" not in tav("status", "ball").out
