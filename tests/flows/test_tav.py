"""The flow as a graph: what depends on what, what is cached, and what runs at the same time."""

from __future__ import annotations

import importlib
import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tav.config import load_params
from tav.config.paths import Project
from tav.config.results import read_scores
from tav.runtime.events import EventStream
from tests.support.projects import QUICK, change_params, fresh_clone, run

CLIPS = ("ball", "cube")
# In one process: the flow several times, and what Prefect's API knows of the task runs.
FLOWS = """
import json, os, sys
from pathlib import Path
from flows.temporary_server import start_temporary_server

os.environ["PREFECT_API_URL"] = start_temporary_server(Path("logs/server.log"))
os.environ["PREFECT_LOGGING_LEVEL"] = "CRITICAL"
from prefect.client.orchestration import get_client
from prefect.client.schemas.sorting import TaskRunSort
from flows.observers import observed_by
from flows.tav import tav
from tav.runtime.events import StageFinished, StageStarted

spans = {}

def note(event):
    if isinstance(event, StageStarted | StageFinished):
        spans.setdefault(event.title, []).append(event.time)

found = []
for overrides in json.loads(sys.argv[1]):
    spans.clear()
    with observed_by(note):
        state = tav(None, None, overrides, return_state=True)
    with get_client(sync_client=True) as client:
        newest = max(client.read_flow_runs(), key=lambda one: one.created)
        runs = [one for one in client.read_task_runs(limit=200) if one.flow_run_id == newest.id]
    found.append({
        "state": state.name,
        "message": state.message,
        "spans": dict(spans),
        "runs": {
            str(one.id): {
                "name": one.name,
                "state": one.state_name,
                "message": one.state.message,
                "depends_on": [str(other.id) for inputs in one.task_inputs.values() for other in inputs],
                "start": one.start_time.timestamp(),
                "end": one.end_time.timestamp(),
            }
            for one in runs
        },
    })
print("FOUND", json.dumps(found))
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips with two edits each, and nothing run yet."""
    clone = fresh_clone(tmp_path_factory.mktemp("flow") / "project")
    clips = {
        name: {"video": f"data/{name}.mp4", "caption": f"a red {name}", "prompts": f"data/{name}.csv", "decode": {}}
        for name in CLIPS
    }
    changes = QUICK | {"tune": {"steps": 20}, "score": {"clip_model": None}, "tracking": {"uri": None}}
    change_params(clone, changes, clips)
    for name in CLIPS:
        (clone / f"data/{name}.csv").write_text(f"name,prompt\nblue,a blue {name}\npink,a pink {name}\n")
    return clone


def run_flows(project: Path, home: Path, *overrides: dict[str, Any]) -> list[dict[str, Any]]:
    """Run the flow once for each set of overrides."""
    done = run(project, "python", "-c", FLOWS, json.dumps(overrides), PREFECT_HOME=str(home), DO_NOT_TRACK="1")
    found: list[dict[str, Any]] = json.loads(done.stdout.partition("FOUND ")[2])
    return found


@pytest.fixture(scope="module")
def flows(project: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What four flow runs were: the first, one with nothing to do, one with another setting, and one back to the first's."""
    home = tmp_path_factory.mktemp("prefect")
    settings = load_params(project / "params.yaml").edit
    other = {"edit.guidance_scale": 2.0, "runtime.edit_batch": 2}
    found = run_flows(project, home, {}, {}, other, {"edit.guidance_scale": settings.guidance_scale})
    assert [one["state"] for one in found] == ["Completed"] * 4
    return found


def edges(flow: dict[str, Any]) -> set[tuple[str, str]]:
    runs = flow["runs"]
    return {(runs[other]["name"], one["name"]) for one in runs.values() for other in one["depends_on"]}


def test_task_runs_depend_on_the_stages_before_them(flows: list[dict[str, Any]]) -> None:
    expected = set()
    for clip in CLIPS:
        rows = [f"edit: a {colour} {clip}" for colour in ("blue", "pink")]
        expected |= {
            (f"decode: {clip}", f"encode: {clip}"),
            (f"decode: {clip}", f"annotate: {clip}"),
            (f"encode: {clip}", f"tune: {clip}"),
            (f"annotate: {clip}", f"tune: {clip}"),
            (f"annotate: {clip}", f"invert: {clip}"),
            (f"encode: {clip}", f"invert: {clip}"),
            (f"tune: {clip}", f"invert: {clip}"),
            (f"decode: {clip}", f"score: {clip}"),
            *((f"{stage}: {clip}", row) for stage in ("tune", "invert") for row in rows),
            *((row, f"score: {clip}") for row in rows),
        }
    for flow in flows:
        assert edges(flow) == expected


def test_what_is_up_to_date_is_cached_and_the_graph_complete(flows: list[dict[str, Any]]) -> None:
    first, second, third, fourth = (
        {one["name"]: (one["state"], one["message"]) for one in flow["runs"].values()} for flow in flows
    )
    assert set(first) == set(second) == set(third) == set(fourth) and len(first) == 16
    assert {state for state, _ in first.values()} == {"Completed"}
    assert set(second.values()) == {("Cached", "up to date")}
    redone = {name for name, (state, _) in third.items() if state == "Completed"}
    assert redone == {name for name in first if name.startswith(("edit: ", "score: "))}
    assert {name: message for name, (_, message) in fourth.items() if name.startswith("score: ")} == {
        f"score: {clip}": "restored from DVC's cache" for clip in CLIPS
    }


def test_the_report_shows_the_results_of_the_last_run(project: Path, flows: list[dict[str, Any]]) -> None:
    for clip in CLIPS:
        page = (project / f"results/{clip}/report.html").read_text()
        for scores in read_scores(project / f"results/{clip}/scores").values():
            assert f'data-value="{scores["warping_error"]}"' in page


def test_a_clip_is_decoded_and_encoded_while_another_is_worked_on(flows: list[dict[str, Any]]) -> None:
    times = {one["name"]: (one["start"], one["end"]) for one in flows[0]["runs"].values()}
    clips = [
        (min(start for name, (start, _) in times.items() if name.endswith(clip)), times[f"score: {clip}"][1])
        for clip in CLIPS
    ]
    (_, first_end), (second_start, _) = sorted(clips)
    assert second_start < first_end


def test_one_device_is_held_by_one_stage_at_a_time(flows: list[dict[str, Any]]) -> None:
    held = sorted(
        (one["start"], one["end"])
        for one in flows[0]["runs"].values()
        if one["name"].startswith(("tune", "invert", "edit", "score"))
    )
    assert all(end <= start + 0.05 for (_, end), (start, _) in pairwise(held))


def test_two_devices_tune_two_clips_at_once(project: Path, flows: list[dict[str, Any]], tmp_path: Path) -> None:
    # Steps long enough that the second tuning begins before the first one ends.
    (flow,) = run_flows(project, tmp_path, {"runtime.device": '["cpu", "cpu"]', "tune.steps": 150})
    assert flow["state"] == "Completed"
    (start, end), (other_start, other_end) = (flow["spans"][f"tune {clip}"] for clip in CLIPS)
    assert max(start, other_start) < min(end, other_end)
    assert "up to date" in run(project, "dvc", "status").stdout


def test_a_failed_row_fails_its_clip_alone(project: Path, flows: list[dict[str, Any]], tmp_path: Path) -> None:
    table = project / "data/cube.csv"
    good = table.read_text()
    table.write_text(good + "broken,a broken cube\n")
    try:
        script = FLOWS.replace(
            "spans = {}",
            "from tav_model import TuneAVideoPipeline\n"
            "call = TuneAVideoPipeline.__call__\n"
            "def fails(self, prompt, **settings):\n"
            "    if 'a broken cube' in prompt: raise RuntimeError('cannot be drawn')\n"
            "    return call(self, prompt, **settings)\n"
            "TuneAVideoPipeline.__call__ = fails\n"
            "spans = {}",
        )
        done = run(project, "python", "-c", script, "[{}]", check=False, PREFECT_HOME=str(tmp_path), DO_NOT_TRACK="1")
        (flow,) = json.loads(done.stdout.partition("FOUND ")[2])
    finally:
        table.write_text(good)
    assert flow["state"] == "Failed"
    assert "cube: edit: 1 of 3 rows failed: broken (cannot be drawn). 2 done and kept" in flow["message"]
    states = {one["name"]: one["state"] for one in flow["runs"].values()}
    assert states["edit: a broken cube"] == "Failed" and states["score: ball"] in ("Completed", "Cached")
    assert {states[f"edit: a {colour} cube"] for colour in ("blue", "pink")} == {"Cached"}


def test_the_log_names_words_that_the_model_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[str] = []
    logger = SimpleNamespace(warning=lambda text, *values: logged.append(text % values), info=lambda *_: None)
    flow = importlib.import_module("flows.tav")
    monkeypatch.setattr(flow, "get_run_logger", lambda: logger)
    monkeypatch.setattr(flow, "_run_stages", lambda run, clip: False)
    monkeypatch.setattr(flow, "_mean_scores", lambda run, clip: {})
    monkeypatch.setattr(flow, "refresh_reports", lambda root, clip: None)
    stages = SimpleNamespace(unknown_words_warning=lambda: 'toyworld does not know "zebra"', project=Project(Path()))
    run = SimpleNamespace(events=EventStream(), root=Path(), stages=lambda clip: stages)
    assert flow.run_clip(run, "ball") is None
    assert logged == ['ball: toyworld does not know "zebra"']
