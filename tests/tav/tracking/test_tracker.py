"""Runs in real MLflow stores, found again by every process."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tav.tracking import tracker as tracking
from tav.tracking.tracker import Tracker
from tests.support.mlflow_store import PARAMS, URI, client, history, missed, runs


def test_importing_the_module_leaves_mlflow_alone():
    code = "import sys, tav.tracking.tracker; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_without_a_uri_nothing_is_tracked(tmp_path):
    with Tracker(None, "tav", tmp_path) as tracker:
        run = tracker.pipeline("ball", PARAMS)
        run.child("tune", "a", "tune").log_metrics({"loss": 1.0}, 1)
        run.finish()
    assert list(tmp_path.iterdir()) == []


def test_a_configuration_of_a_clip_has_one_run_in_all_processes(root):
    for _ in range(2):
        with Tracker(URI, "tav", root) as tracker:
            tracker.pipeline("ball", PARAMS)
    with Tracker(URI, "tav", root) as tracker:
        tracker.pipeline("ball", PARAMS | {"seed": 34})
        tracker.pipeline("ball", PARAMS | {"attention.temporal": False})
        tracker.pipeline("skier", PARAMS)
    found = runs(root)
    assert [run.info.run_name for run in found] == [
        "ball · first,former · 300 steps",
        "ball · seed 34 · first,former · 300 steps",
        "ball · first,former · no temporal · 300 steps",
        "skier · first,former · 300 steps",
    ]
    assert found[0].data.params == {name: str(value) for name, value in PARAMS.items()}
    assert found[0].data.tags["tav.clip"] == "ball"
    assert found[0].info.status == "RUNNING"


def test_names_show_the_settings_by_which_runs_differ(root):
    """By the keys of params.yaml, because `steps 10 · steps 10` would be two settings that nobody can tell apart."""
    with Tracker(URI, "tav", root) as tracker:
        changes = {"edit.steps": 10, "invert.steps": 10}
        tracker.pipeline("ball", PARAMS | changes, changes)
        # Committed since: no changes any more, but other parameters than the first run's.
        tracker.pipeline("ball", PARAMS | {"edit.steps": 20, "invert.steps": 20})
        tracker.pipeline("ball", PARAMS | {"edit.steps": 20, "invert.steps": 30})
    assert [run.info.run_name for run in runs(root)] == [
        "ball · edit.steps 10 · invert.steps 10 · first,former · 300 steps",
        "ball · first,former · 300 steps",
        "ball · invert.steps 30 · first,former · 300 steps",
    ]


def test_children_belong_to_their_run_and_are_found_again(root):
    for value in (0.1, 0.2):
        with Tracker(URI, "tav", root, tags={"prefect.flow_run_id": "abc"}) as tracker:
            run = tracker.pipeline("ball", PARAMS)
            child = run.child("edit", "row-1", "a cat")
            child.log_params({"prompt": "a cat"})
            child.log_metrics({"frame_consistency": value})
            child.set_tags({"dvc.inverted": "md5"})
            child.finish()
            run.child("edit", "row-2", "a dog").finish("FAILED")
            run.finish()
    parent, cat, dog = runs(root)
    assert [run.info.status for run in (parent, cat, dog)] == ["FINISHED", "FINISHED", "FAILED"]
    assert cat.info.run_name == "a cat"
    assert cat.data.params == {"prompt": "a cat"}
    assert cat.data.metrics == {"frame_consistency": 0.2}
    assert cat.data.tags["dvc.inverted"] == "md5"
    for run in (cat, dog):
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.tags["tav.kind"] == "edit"
        assert run.data.tags["tav.clip"] == "ball"
        assert run.data.tags["prefect.flow_run_id"] == "abc"


def test_a_finished_run_is_reopened(root):
    with Tracker(URI, "tav", root) as tracker:
        tracker.pipeline("ball", PARAMS).finish()
    with Tracker(URI, "tav", root) as tracker:
        run = tracker.pipeline("ball", PARAMS)
        assert runs(root)[0].info.status == "RUNNING"
        run.finish("KILLED")
    assert [run.info.status for run in runs(root)] == ["KILLED"]


def test_a_resumed_curve_has_each_step_once(root):
    for first, last in ((1, 150), (1, 200), (190, 300)):
        with Tracker(URI, "tav", root) as tracker:
            tune = tracker.pipeline("ball", PARAMS).child("tune", "tune", "tune")
            for step in range(first, last + 1):
                tune.log_metrics({"loss": 1 / step, "learning_rate": 3e-5}, step)
    assert history(root, "loss") == [(step, 1 / step) for step in range(1, 301)]
    assert len(history(root, "learning_rate")) == 300


def test_a_result_is_replaced_when_it_changes(root):
    for value in (0.5, 0.5, 0.75, 0.5):
        with Tracker(URI, "tav", root) as tracker:
            tracker.pipeline("ball", PARAMS).log_metrics({"textual_alignment": value})
            time.sleep(0.002)
    assert runs(root)[0].data.metrics == {"textual_alignment": 0.5}
    assert [value for _, value in history(root, "textual_alignment")] == [0.5, 0.75, 0.5]


def test_a_setting_that_affects_no_result_may_change(root):
    for device in ("cpu", "cuda"):
        with Tracker(URI, "tav", root) as tracker:
            tracker.pipeline("ball", PARAMS).log_params({"runtime.device": device, "note": "x" * 9000})
    assert runs(root)[0].data.params["runtime.device"] == "cpu"
    assert runs(root)[0].data.tags["runtime.device"] == "cuda"
    assert "note" not in runs(root)[0].data.tags


def test_more_parameters_than_mlflow_takes_at_once(root):
    params = {f"p.{i}": i for i in range(250)}
    with Tracker(URI, "tav", root) as tracker:
        tracker.pipeline("ball", params)
    assert len(runs(root)[0].data.params) == 250


def test_metrics_are_held_and_sent_together(root, monkeypatch):
    with Tracker(URI, "tav", root) as tracker:
        run = tracker.pipeline("ball", PARAMS)
        for step in range(50):
            run.log_metrics({"loss": 1.0}, step)
        assert history(root, "loss") == []
        monkeypatch.setattr(tracking, "FLUSH_SECONDS", 0.0)
        run.log_metrics({"loss": 1.0}, 50)
        assert len(history(root, "loss")) == 51
        monkeypatch.setattr(tracking, "FLUSH_SECONDS", 60.0)
        run.log_metrics({"loss": 1.0}, 51)
    assert len(history(root, "loss")) == 52


def test_an_artifact_replaces_the_earlier_one(root, tmp_path):
    video = tmp_path / "cat.mp4"
    for content in (b"one", b"second"):
        video.write_bytes(content)
        with Tracker(URI, "tav", root) as tracker:
            tracker.pipeline("ball", PARAMS).log_artifact(video, "edits")
    run_id = runs(root)[0].info.run_id
    assert [file.path for file in client(root).list_artifacts(run_id, "edits")] == ["edits/cat.mp4"]
    assert Path(client(root).download_artifacts(run_id, "edits/cat.mp4")).read_bytes() == b"second"
    assert (root / "mlartifacts" / run_id / "artifacts" / "edits" / "cat.mp4").exists()


DATASET = {
    "name": "ball",
    "digest": "0" * 32,
    "source": "data/ball.mp4",
    "shape": [8, 128, 128, 3],
    "dtype": "uint8",
    "profile": {"frames": 8, "fps": "84/23"},
    "context": "tuning",
}


def test_a_dataset_is_logged_once(root):
    for _ in range(2):
        with Tracker(URI, "tav", root) as tracker:
            tracker.pipeline("ball", PARAMS).log_dataset(DATASET)
    (one,) = runs(root)[0].inputs.dataset_inputs
    assert (one.dataset.name, one.dataset.digest) == ("ball", "0" * 32)
    assert json.loads(one.dataset.source) == {"uri": "data/ball.mp4"}
    assert [(tag.key, tag.value) for tag in one.tags] == [("mlflow.data.context", "tuning")]


def test_a_model_is_stored_once_and_linked_where_it_is_reused(root, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "MLmodel").write_text("flavors: {}")
    with Tracker(URI, "tav", root) as tracker:
        made, reused = tracker.pipeline("ball", PARAMS), tracker.pipeline("ball", PARAMS | {"edit.steps": 9})
        assert not made.link_model("abc")
        made.log_model(folder, "abc", {"tune.steps": 300})
    for _ in range(2):
        with Tracker(URI, "tav", root) as tracker:
            assert tracker.pipeline("ball", PARAMS).link_model("abc")
            assert tracker.pipeline("ball", PARAMS | {"edit.steps": 9}).link_model("abc")
    assert not reused.link_model("abcd")
    first, second = (client(root).get_run(run.info.run_id) for run in runs(root))
    (output,) = first.outputs.model_outputs
    (link,) = second.inputs.model_inputs
    assert output.model_id == link.model_id
    assert not first.inputs.model_inputs and not second.outputs.model_outputs
    assert client(root).get_logged_model(link.model_id).source_run_id == first.info.run_id
    assert len(list((root / "mlartifacts").rglob("MLmodel"))) == 1


def test_threads_share_a_tracker(root):
    with Tracker(URI, "tav", root) as tracker:
        run = tracker.pipeline("ball", PARAMS)

        def render(row):
            child = run.child("edit", f"row-{row % 4}", f"row {row % 4}")
            for step in range(20):
                child.log_metrics({"seconds": float(step)}, step)
            child.finish()

        threads = [threading.Thread(target=render, args=(row,)) for row in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(run.info.run_name for run in runs(root)[1:]) == ["row 0", "row 1", "row 2", "row 3"]
    assert [len(history(root, "seconds", run=i)) for i in range(1, 5)] == [20, 20, 20, 20]


@pytest.mark.slow
def test_two_processes_may_be_the_first_and_both_are_silent(tmp_path):
    code = f"""
from pathlib import Path
from tav.tracking.tracker import Tracker
with Tracker("sqlite:///runs/mlflow.db", "tav", Path({str(tmp_path)!r})) as tracker:
    run = tracker.pipeline("ball", {PARAMS!r})
    run.child("tune", "tune", "tune").finish()
    run.finish()
"""
    # The logging of a plain program: warnings go to stderr.
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for _ in range(2)
    ]
    assert [process.communicate(timeout=120)[0].decode() for process in processes] == ["", ""]
    assert [process.returncode for process in processes] == [0, 0]
    assert [run.data.tags["tav.kind"] for run in runs(tmp_path, "sqlite:///runs/mlflow.db")] == ["pipeline", "tune"]
    assert missed(tmp_path) == []
