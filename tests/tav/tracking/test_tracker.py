"""Tracking against real MLflow stores: SQLite files, a server, and both of them broken."""

import contextlib
import json
import logging
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tav.config.dotted_keys import flatten
from tav.runtime.redaction import redact
from tav.tracking import tracker as tracking
from tav.tracking.provenance import environment_tags
from tav.tracking.store import project_root, resolve_uri
from tav.tracking.tracker import Tracker
from tav_model.errors import TavError
from tests.support.servers import get, mlflow_server

URI = "sqlite:///mlflow.db"
PARAMS = {"attention.spatial": "first,former", "attention.temporal": True, "tune.steps": 300, "seed": 33}


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory):
    """A database with MLflow's tables, which take seconds to make."""
    root = tmp_path_factory.mktemp("empty")
    Tracker(URI, "tav", root).pipeline("ball", {})
    import sqlite3

    with contextlib.closing(sqlite3.connect(root / "mlflow.db")) as database:
        for table in ("tags", "latest_metrics", "metrics", "params", "runs"):
            database.execute(f"DELETE FROM {table}")
        database.execute("DELETE FROM experiments WHERE name = 'tav'")
        database.commit()
    return root / "mlflow.db"


@pytest.fixture
def root(tmp_path, empty_database):
    root = tmp_path / "a projèct"
    root.mkdir()
    shutil.copy(empty_database, root / "mlflow.db")
    return root


def client(root, uri=URI):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=resolve_uri(uri, root))


def runs(root, uri=URI):
    """All runs of the experiment `tav`, the oldest first."""
    store = client(root, uri)
    experiment = store.get_experiment_by_name("tav")
    return store.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"]) if experiment else []


def history(root, name, uri=URI, run=-1):
    store = client(root, uri)
    return [(point.step, point.value) for point in store.get_metric_history(runs(root, uri)[run].info.run_id, name)]


def missed(root):
    path = root / ".tav" / "tracking-missed.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line] if path.exists() else []


# Parameters and addresses


def test_flatten_shows_parameters_as_people_compare_them():
    params = {"attention": {"spatial": ["first", "former"], "temporal": True}, "seed": 33, "decode": {"end": None}}
    assert flatten(params) == {
        "attention.spatial": "first,former",
        "attention.temporal": True,
        "seed": 33,
        "decode.end": "None",
    }


@given(st.recursive(st.integers(), lambda inner: st.dictionaries(st.text("abc", min_size=1), inner, min_size=1)))
def test_flatten_keeps_each_value_under_the_path_to_it(tree):
    flat = flatten({"root": tree})
    for path, value in flat.items():
        node = {"root": tree}
        for name in path.split("."):
            node = node[name]
        assert node == value
    assert len(flat) == str(tree).count(":") - str(tree).count(": {") if isinstance(tree, dict) else len(flat) == 1


def test_a_dvc_experiments_copy_logs_to_the_real_project(tmp_path):
    assert project_root(tmp_path) == tmp_path
    assert project_root(tmp_path / ".dvc" / "tmp" / "exps" / "standalone" / "tmpx" / "sub") == tmp_path
    tracker = Tracker(URI, "tav", tmp_path / ".dvc" / "tmp" / "exps" / "tmpx")
    assert tracker._uri == f"sqlite:///{tmp_path}/mlflow.db"


def test_relative_databases_count_from_the_root(tmp_path):
    assert (
        resolve_uri("sqlite:///runs/mlflow.db?timeout=30", tmp_path)
        == f"sqlite:///{tmp_path}/runs/mlflow.db?timeout=30"
    )
    assert resolve_uri("sqlite:////srv/mlflow.db", tmp_path) == "sqlite:////srv/mlflow.db"
    assert resolve_uri("http://127.0.0.1:5000", tmp_path) == "http://127.0.0.1:5000"
    assert resolve_uri("postgresql+psycopg2://h/d", tmp_path) == "postgresql+psycopg2://h/d"


@pytest.mark.parametrize("uri", ["mlruns", "", "file:///tmp/mlruns", "sqlite:///", "sqlite:///:memory:", "http:5000"])
def test_other_addresses_are_refused_by_name(tmp_path, uri):
    with pytest.raises(TavError, match=r"params\.yaml: tracking\.uri: .*sqlite:///mlflow\.db"):
        Tracker(uri, "tav", tmp_path)


@given(st.text("abcXYZ019:@!$-_.~%", min_size=1), st.text("abcXYZ019=&%-_", min_size=1))
def test_redact_takes_secrets_out_and_leaves_the_rest(login, query):
    text = f"see http://{login}@host:5000/a?{query}, who is it? a@b"
    assert redact(text).startswith("see http://host:5000/a")
    assert redact(text).endswith("who is it? a@b")
    assert redact("who is it? a@b") == "who is it? a@b"


def test_importing_the_module_leaves_mlflow_alone():
    code = "import sys, tav.tracking.tracker; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_without_a_uri_nothing_is_tracked(tmp_path):
    with Tracker(None, "tav", tmp_path) as tracker:
        run = tracker.pipeline("ball", PARAMS)
        run.child("tune", "a", "tune").log_metrics({"loss": 1.0}, 1)
        run.finish()
    assert list(tmp_path.iterdir()) == []


# Runs


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
        "ball · first,former · 300 steps",
        "ball · first,former · no temporal · 300 steps",
        "skier · first,former · 300 steps",
    ]
    assert found[0].data.params == {name: str(value) for name, value in PARAMS.items()}
    assert found[0].data.tags["tav.clip"] == "ball"
    assert found[0].info.status == "RUNNING"


def test_children_stand_below_their_run_and_are_found_again(root):
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


def test_a_finished_run_asked_for_again_is_open(root):
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


def test_a_setting_that_decides_no_result_may_change(root):
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


def test_an_artifact_takes_the_place_of_the_one_before(root, tmp_path):
    video = tmp_path / "cat.mp4"
    for content in (b"one", b"second"):
        video.write_bytes(content)
        with Tracker(URI, "tav", root) as tracker:
            tracker.pipeline("ball", PARAMS).log_artifact(video, "edits")
    run_id = runs(root)[0].info.run_id
    assert [file.path for file in client(root).list_artifacts(run_id, "edits")] == ["edits/cat.mp4"]
    assert Path(client(root).download_artifacts(run_id, "edits/cat.mp4")).read_bytes() == b"second"
    assert (root / "mlartifacts" / run_id / "artifacts" / "edits" / "cat.mp4").exists()


def test_an_interrupted_call_is_made_good_by_the_next(root, monkeypatch):
    with Tracker(URI, "tav", root) as tracker:
        run = tracker.pipeline("ball", PARAMS)
        run.log_metrics({"loss": 1.0}, 1)
        with monkeypatch.context() as patch:
            patch.setattr(tracker._client, "log_batch", lambda *args, **kwargs: signal.raise_signal(signal.SIGINT))
            with pytest.raises(KeyboardInterrupt):
                run.flush()
        run.finish("KILLED")
    assert history(root, "loss") == [(1, 1.0)]


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


# Who ran what


def test_tags_say_the_revision_and_whether_something_was_changed(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "1234")
    git("init", "-q")
    assert "mlflow.source.git.commit" not in environment_tags(tmp_path)
    for name in ("params.yaml", "dvc.lock"):
        (tmp_path / name).write_text("a")
    git("add", ".")
    git("commit", "-qm", "first")
    (tmp_path / "dvc.lock").write_text("b")
    tags = environment_tags(tmp_path)
    assert tags["mlflow.source.git.commit"] == git("rev-parse", "HEAD").strip()
    assert tags["tav.git.dirty"] == "False"
    assert tags["prefect.flow_run_id"] == "1234"
    (tmp_path / "params.yaml").write_text("b")
    assert environment_tags(tmp_path)["tav.git.dirty"] == "True"


# Stores that do not answer


def break_database(root):
    shutil.copyfile(root / "mlflow.db", root / "whole.db")
    (root / "mlflow.db").write_text("this is no database, though it is long enough to look like one " * 20)


def log_everything(root, video):
    with Tracker(URI, "tav", root) as tracker:
        run = tracker.pipeline("ball", PARAMS)
        tune = run.child("tune", "tune", "tune")
        for step in range(1, 11):
            tune.log_metrics({"loss": 1 / step}, step)
        tune.log_artifact(video, "videos")
        tune.finish()
        run.finish("FAILED")


def test_what_a_broken_store_misses_is_sent_by_the_next(root, tmp_path, caplog):
    video = tmp_path / "source.mp4"
    video.write_bytes(b"frames")
    break_database(root)
    started = time.monotonic()
    log_everything(root, video)
    assert time.monotonic() - started < 5
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "file is not a database" in warnings[0]
    assert "'ball · first,former · 300 steps'" in warnings[0]
    assert ".tav/tracking-missed.jsonl" in warnings[0]
    assert len(missed(root)) == 6
    video.unlink()
    waiting = (root / ".tav" / "tracking-missed.jsonl").read_text()

    shutil.copyfile(root / "whole.db", root / "mlflow.db")
    for _ in range(2):  # Entries that were sent before, as after a kill at the wrong moment, do no harm.
        (root / ".tav" / "tracking-missed.jsonl").write_text('{"half a li\n' + waiting)
        Tracker(URI, "tav", root).pipeline("skier", PARAMS)
        assert missed(root) == []
    assert list((root / ".tav" / "tracking-missed").iterdir()) == []
    parent, tune = runs(root)[:2]
    assert [run.info.status for run in (parent, tune)] == ["FAILED", "FINISHED"]
    assert parent.data.params["tune.steps"] == "300"
    assert tune.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert history(root, "loss", run=1) == [(step, 1 / step) for step in range(1, 11)]
    path = client(root).download_artifacts(tune.info.run_id, "videos/source.mp4")
    assert Path(path).read_bytes() == b"frames"
    assert any("line that is not whole" in record.getMessage() for record in caplog.records)


def test_a_store_is_asked_again_after_a_while(root, monkeypatch, caplog):
    with Tracker(URI, "tav", root) as tracker:
        run = tracker.pipeline("ball", PARAMS)
        with monkeypatch.context() as patch:
            patch.setattr(tracker._client, "log_batch", _fail)
            run.log_metrics({"loss": 1.0}, 1)
            run.flush()
        run.log_metrics({"loss": 0.5}, 2)
        run.flush()
        assert len(missed(root)) == 2
        tracker._away_until = 0.0
        run.log_metrics({"loss": 0.25}, 3)
    assert history(root, "loss") == [(1, 1.0), (2, 0.5), (3, 0.25)]
    assert missed(root) == []


def _fail(*args, **kwargs):
    raise OSError(28, "No space left on device")


def test_entries_of_another_store_wait_for_it(root):
    (root / ".tav").mkdir()
    line = json.dumps({"store": "http://elsewhere:5000 tav", "run": {}, "time": 0})
    (root / ".tav" / "tracking-missed.jsonl").write_text(line + "\n")
    Tracker(URI, "tav", root).pipeline("ball", PARAMS)
    assert [entry["store"] for entry in missed(root)] == ["http://elsewhere:5000 tav"]


def test_one_entry_that_cannot_be_sent_does_not_hold_up_the_others(root, caplog):
    log = root / ".tav" / "tracking-missed.jsonl"
    log.parent.mkdir()
    with Tracker(URI, "tav", root) as tracker:
        run = tracker.pipeline("ball", PARAMS)
        tracker._keep({"store": tracker._label, "run": run.identity, "time": 0, "metrics": [["loss"]]})
        tracker._keep({"store": tracker._label, "run": run.identity, "time": 0, "metrics": [["loss", 1.0, 1, 7]]})
    Tracker(URI, "tav", root).pipeline("skier", PARAMS)
    assert history(root, "loss", run=0) == [(1, 1.0)]
    assert [entry["metrics"] for entry in missed(root)] == [[["loss"]]]


def test_what_mlflow_refuses_is_named_and_the_rest_is_logged(root, tmp_path, caplog):
    with Tracker(URI, "tav", root) as tracker:
        run = tracker.pipeline("ball", PARAMS)
        run.log_metrics({"loss; drop": 1.0}, 1)
        run.flush()
        run.log_artifact(tmp_path / "none.mp4")
        run.log_metrics({"loss": 1.0}, 1)
    first, second = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "metrics of 'ball" in first
    assert "loss; drop" in first
    assert "none.mp4" in second
    assert history(root, "loss") == [(1, 1.0)]
    assert missed(root) == []


def test_secrets_are_written_nowhere(tmp_path, caplog):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        started = time.monotonic()
        with Tracker(f"http://alice:geheim@127.0.0.1:{port}/?token=abc123", "tav", tmp_path) as tracker:
            tracker.pipeline("ball", PARAMS | {"base_model": "https://bob:passwort@hub/x?key=xyz789"})
        assert time.monotonic() - started < 5
    assert "Connection refused" in caplog.text
    written = caplog.text + "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert f"http://127.0.0.1:{port}" in written
    for secret in ("geheim", "abc123", "passwort", "xyz789"):
        assert secret not in written


# A real server


def test_a_server_shows_what_was_logged_without_it_takes_more_and_may_be_killed(root, tmp_path, caplog, capfd):
    video = tmp_path / "cat.mp4"
    video.write_bytes(b"frames" * 1000)
    with Tracker(URI, "tav", root) as tracker:
        tracker.pipeline("ball", PARAMS).log_artifact(video, "edits")
    run_id = runs(root)[0].info.run_id
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"

    with mlflow_server(root, port):
        listed = json.loads(get(port, f"/ajax-api/2.0/mlflow/artifacts/list?run_id={run_id}&path=edits"))
        assert listed["files"] == [{"path": "edits/cat.mp4", "is_dir": False, "file_size": 6000}]
        assert get(port, f"/get-artifact?run_uuid={run_id}&path=edits/cat.mp4") == video.read_bytes()

        tracker = Tracker(uri, "served", root)
        run = tracker.pipeline("ball", PARAMS)
        run.log_metrics({"loss": 0.5, "gradient_norm": float("nan")}, 1)
        run.log_artifact(video, "edits")
        run.flush()
        served = client(root, uri).search_runs(["2"])[0]
        assert served.data.metrics["loss"] == 0.5
        assert served.info.artifact_uri.startswith("mlflow-artifacts:")
        listed = json.loads(get(port, f"/ajax-api/2.0/mlflow/artifacts/list?run_id={served.info.run_id}&path=edits"))
        assert [file["path"] for file in listed["files"]] == ["edits/cat.mp4"]

    started = time.monotonic()
    run.log_metrics({"loss": 0.25}, 2)
    run.log_artifact(video, "late")
    run.finish()
    assert time.monotonic() - started < 5
    assert len(caplog.records) == 1
    assert re.search("refused|reset", caplog.records[0].getMessage())
    assert [{"metrics", "artifact", "status"} & entry.keys() for entry in missed(root)] == [
        {"artifact"},
        {"metrics"},
        {"status"},
    ]
    assert capfd.readouterr() == ("", "")

    with mlflow_server(root, port):
        Tracker(uri, "served", root).pipeline("ball", PARAMS).finish()
        run_id = client(root, uri).search_runs(["2"])[0].info.run_id
        points = client(root, uri).get_metric_history(run_id, "loss")
        assert [(point.step, point.value) for point in points] == [(1, 0.5), (2, 0.25)]
        assert get(port, f"/get-artifact?run_uuid={run_id}&path=late/cat.mp4") == video.read_bytes()
    assert missed(root) == []
