"""A store that does not answer, or refuses an entry, costs little and stops nothing."""

import json
import logging
import re
import signal
import socket
import time

import pytest

from tav.tracking.tracker import Tracker
from tests.support.mlflow_store import PARAMS, URI, client, history, missed, runs
from tests.support.servers import get, mlflow_server


def test_an_interrupted_call_is_repeated(root, monkeypatch):
    with Tracker(URI, "tav", root) as tracker:
        run = tracker.pipeline("ball", PARAMS)
        run.log_metrics({"loss": 1.0}, 1)
        with monkeypatch.context() as patch:
            patch.setattr(
                tracker.delivery._store._client, "log_batch", lambda *args, **kwargs: signal.raise_signal(signal.SIGINT)
            )
            with pytest.raises(KeyboardInterrupt):
                run.flush()
        run.finish("KILLED")
    assert history(root, "loss") == [(1, 1.0)]


def _fail(*args, **kwargs):
    raise OSError(28, "No space left on device")


def test_a_store_is_contacted_again_after_a_while(root, monkeypatch, caplog):
    with Tracker(URI, "tav", root) as tracker:
        run = tracker.pipeline("ball", PARAMS)
        with monkeypatch.context() as patch:
            patch.setattr(tracker.delivery._store._client, "log_batch", _fail)
            run.log_metrics({"loss": 1.0}, 1)
            run.flush()
        run.log_metrics({"loss": 0.5}, 2)
        run.flush()
        assert len(missed(root)) == 2
        tracker.delivery._retry_at = 0.0
        run.log_metrics({"loss": 0.25}, 3)
    assert history(root, "loss") == [(1, 1.0), (2, 0.5), (3, 0.25)]
    assert missed(root) == []


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


@pytest.mark.slow
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
