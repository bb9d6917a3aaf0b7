"""Entries that a store misses wait, and are sent by the next process that reaches it."""

import json
import logging
import shutil
import time
from pathlib import Path

from tav.tracking.outbox import Outbox
from tav.tracking.store import Store, resolve_uri
from tav.tracking.tracker import Tracker
from tests.support.mlflow_store import PARAMS, URI, client, history, missed, runs


def break_database(root):
    shutil.copyfile(root / "mlflow.db", root / "intact.db")
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

    shutil.copyfile(root / "intact.db", root / "mlflow.db")
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
    assert any("dropped an incomplete line" in record.getMessage() for record in caplog.records)


def test_entries_of_another_store_wait_for_it(root):
    (root / ".tav").mkdir()
    line = json.dumps({"store": "http://elsewhere:5000 tav", "run": {}, "time": 0})
    (root / ".tav" / "tracking-missed.jsonl").write_text(line + "\n")
    Tracker(URI, "tav", root).pipeline("ball", PARAMS)
    assert [entry["store"] for entry in missed(root)] == ["http://elsewhere:5000 tav"]


def test_one_entry_that_cannot_be_sent_does_not_hold_up_the_others(root, caplog):
    label = Store(resolve_uri(URI, root), "tav", root).label
    with Tracker(URI, "tav", root) as tracker:
        run = tracker.pipeline("ball", PARAMS)
    outbox = Outbox(root)
    outbox.append({"store": label, "run": run.identity, "time": 0, "metrics": [["loss"]]})
    outbox.append({"store": label, "run": run.identity, "time": 0, "metrics": [["loss", 1.0, 1, 7]]})
    Tracker(URI, "tav", root).pipeline("skier", PARAMS)
    assert history(root, "loss", run=0) == [(1, 1.0)]
    assert [entry["metrics"] for entry in missed(root)] == [[["loss"]]]
