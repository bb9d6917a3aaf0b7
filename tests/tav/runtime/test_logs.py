"""The log file of a stage: its loops' lines, the modules' records, and nothing of other clips."""

from __future__ import annotations

import logging
import re
import threading
from contextvars import copy_context
from pathlib import Path

import pytest

from tav.runtime.events import EventStream
from tav.runtime.logs import logging_to, stage_log
from tav.runtime.progress import Progress
from tav_model.errors import TavError

STAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d "


def test_lines_of_the_clips_loops_are_stamped(tmp_path: Path) -> None:
    events, log = EventStream(), tmp_path / "logs" / "tune.log"
    log.parent.mkdir()
    log.write_text("before\n")
    with stage_log(log, events, "ball"):
        with Progress(events, stage="tune", clip="ball", total=1) as progress:
            progress.update()
        with Progress(events, stage="tune", clip="cube", total=1):
            pass
    first, *lines = log.read_text().splitlines()
    assert first == "before" and all(re.match(STAMP, line) for line in lines)
    assert [re.sub(STAMP, "", line).partition(" in ")[0] for line in lines] == [
        "tune ball: starts, 0/1 step",
        "tune ball: done, 1/1 step",
    ]


def test_records_are_complete_there_and_warnings_a_line_on_standard_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    logger = logging.getLogger("tasks.edit")
    log = tmp_path / "logs" / "edit.log"
    with stage_log(log):
        logger.info("row %s", "cat")
        try:
            raise ValueError("no memory")
        except ValueError:
            logger.exception("row dog failed")
    logger.info("after")
    text = log.read_text()
    assert re.match(f"{STAMP}INFO tasks.edit: row cat\n", text)
    assert "ERROR tasks.edit: row dog failed\nTraceback" in text
    assert text.rstrip().endswith("ValueError: no memory")
    assert capsys.readouterr().err == "error: row dog failed\n"


def test_each_clip_logs_to_its_own_file(tmp_path: Path) -> None:
    logger = logging.getLogger("tasks.rows")
    both = threading.Barrier(2, timeout=10)

    def work(clip: str) -> None:
        with stage_log(tmp_path / f"{clip}.log"):
            both.wait()
            logger.info("about %s", clip)
            both.wait()

    threads = [threading.Thread(target=work, args=[clip]) for clip in ("ball", "cube")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for clip, other in (("ball", "cube"), ("cube", "ball")):
        text = (tmp_path / f"{clip}.log").read_text()
        assert f"about {clip}" in text and other not in text


def test_a_thread_may_join_an_open_log(tmp_path: Path) -> None:
    logger, log = logging.getLogger("tasks.rows"), tmp_path / "edit.log"

    def render() -> None:
        with logging_to(log):
            logger.info("a row")

    with stage_log(log), stage_log(tmp_path / "other.log"):
        thread = threading.Thread(target=copy_context().run, args=[render])
        thread.start()
        thread.join()
    assert "a row" in log.read_text() and (tmp_path / "other.log").read_text() == ""


def test_the_loggers_are_left_as_they_were(tmp_path: Path) -> None:
    logger = logging.getLogger("tasks")
    before = logger.level, list(logger.handlers)
    with pytest.raises(ValueError, match="stop"), stage_log(tmp_path / "a.log"):
        raise ValueError("stop")
    assert (logger.level, logger.handlers) == before


def test_a_log_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file where a folder should be")
    with (
        pytest.raises(TavError, match=r"logs/tune\.log: the log cannot be written"),
        stage_log(tmp_path / "logs" / "tune.log"),
    ):
        pass
