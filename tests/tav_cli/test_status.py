"""`tav status`: the state of clips and services, and that looking changes nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from flows import services
from tasks.clip_stages import ClipStages
from tav.config.stages import STAGES
from tests.support.tav_command import Tav, change, contents


def statuses(tav: Tav, *clips: str) -> dict[str, Any]:
    ended = tav("status", "--json", *clips)
    assert ended.code == 0 and ended.err == "", ended
    return json.loads(ended.out)["clips"]


def states(clip: dict[str, Any]) -> dict[str, tuple[str, list[str]]]:
    return {stage: (one["state"], one["reasons"]) for stage, one in clip["stages"].items()}


def test_status_after_a_run_and_of_what_never_ran(tav: Tav, done: Path) -> None:
    before = contents(done)
    found = statuses(tav)
    assert states(found["ball"]) == dict.fromkeys(STAGES, ("up to date", [])) and found["ball"]["up_to_date"]
    assert found["ball"]["prompts"] == {"done": ["blue", "cube"], "todo": [], "problem": None}
    assert {state for state, _ in states(found["cube"]).values()} == {"never run"}
    assert len(found["cube"]["prompts"]["todo"]) == 5
    ended = tav("status")
    assert ended.out.splitlines() == [
        "ball: up to date; prompts: 2 of 2 done",
        "cube: never run; start with: tav run cube",
        "services: not running; tav up starts Prefect and MLflow",
    ]
    assert contents(done) == before
    assert "no clip named 'cat'" in tav("status", "cat").error


def test_status_says_why(tav: Tav, done: Path) -> None:
    change(done / "data/ball.csv", "a red cube\n", "a red cube\nstar,a red star\n")
    (ball,) = statuses(tav, "ball").values()
    assert states(ball)["edit"] == ("stale", ["data/ball.csv changed"])
    assert states(ball)["score"] == ("stale", ["after edit"]) and states(ball)["invert"] == ("up to date", [])
    assert ball["prompts"] == {"done": ["blue", "cube"], "todo": ["star"], "problem": None}
    assert not (done / ".tav/rows/ball/x").exists()

    change(done / "params.yaml", "  learning_rate: 0.006", "  learning_rate: 0.002")
    (ball,) = statuses(tav, "ball").values()
    assert states(ball)["tune"] == ("stale", ["tune.learning_rate 0.006 → 0.002"])
    assert states(ball)["edit"] == ("stale", ["data/ball.csv changed", "after tune"])
    assert ball["prompts"]["todo"] == ["blue", "cube", "star"]
    lines = tav("status", "ball").out.splitlines()
    assert lines[4].split("  ")[1:] and re.fullmatch(r"  tune +stale +tune.learning_rate 0.006 → 0.002 *", lines[4])
    assert lines[8].strip() == "prompts: 0 of 3 done; to render: blue, cube, star"


def test_status_under_control_knows_that_the_tuning_stays(tav: Tav, done: Path) -> None:
    change(done / "params.yaml", "control: []", "control: [{kind: canny, model: models/canny}]")
    (ball,) = statuses(tav, "ball").values()
    state = states(ball)
    assert state["annotate"][0] == "stale" and "control.0.kind unset → canny" in state["annotate"][1]
    assert state["tune"] == ("up to date", []) and state["invert"] == ("stale", ["after annotate"])
    change(done / "params.yaml", "model: models/canny}", "model: models/canny, stages: [tune, edit]}")
    (ball,) = statuses(tav, "ball").values()
    assert states(ball)["tune"] == ("stale", ["after annotate"])


def test_status_of_what_is_lost_but_cached(tav: Tav, done: Path) -> None:
    shutil.rmtree(done / "results/ball/edits")
    (ball,) = statuses(tav, "ball").values()
    assert ball["stages"]["edit"] == {
        "state": "stale",
        "reasons": ["results/ball/edits is missing"],
        "restorable": True,
    }
    assert ball["prompts"]["todo"] == []
    assert "results/ball/edits is missing; in DVC's cache" in tav("status", "ball").out
    assert not (done / "results/ball/edits").exists()


def test_status_while_a_stage_runs(tav: Tav, done: Path) -> None:
    change(done / "params.yaml", "  learning_rate: 0.006", "  learning_rate: 0.002")
    with ClipStages(done, "ball").session("tune"):
        (ball,) = statuses(tav, "ball").values()
        # Who only looks is in nobody's way.
        assert states(ball)["tune"] == ("running", [f"process {os.getpid()}"])
        assert states(ball)["invert"] == ("stale", ["after tune"])
    with ClipStages(done, "ball").session("tune"):
        pass


def test_status_of_a_csv_that_is_wrong_is_a_status_and_an_error(tav: Tav, done: Path) -> None:
    (done / "data/ball.csv").write_text("prompt,steps\na cat,abc\n")
    before = contents(done)
    ended = tav("status", "--json")
    ball = json.loads(ended.out)["clips"]["ball"]
    assert ball["prompts"]["problem"].startswith("data/ball.csv: line 2: steps: 'abc'")
    assert (ended.code, ended.err) == (2, f"error: {ball['prompts']['problem']}\n")
    ended = tav("status")
    assert ended.code == 2 and "prompts: data/ball.csv: line 2: steps" in ended.out
    assert ended.err.startswith("error: data/ball.csv: line 2: steps") and len(ended.err.splitlines()) == 1
    assert tav("status", "cube").code == 0
    assert contents(done) == before


def test_status_of_the_services(tav: Tav, done: Path) -> None:
    with services._only_one(done, "http://127.0.0.1:4200", "http://user:secret@127.0.0.1:5000"):
        found = json.loads(tav("status", "ball", "--json").out)["services"]
        assert found == {"process": os.getpid(), "prefect": "http://127.0.0.1:4200", "mlflow": "http://127.0.0.1:5000"}
        assert "services: Prefect http://127.0.0.1:4200, MLflow http://127.0.0.1:5000" in tav("status", "ball").out
        assert f"the services are already running (process {os.getpid()})" in tav("up").error
