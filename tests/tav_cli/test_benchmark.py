"""`tav benchmark`: its exit codes, its log, and what it prints; the benchmark itself is in tests/flows/test_benchmark.py."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from flows.benchmark import ClipResult
from tav.media.loveu_tgve import Entry
from tav.runtime.events import EventStream, LoopProgressed, LoopStarted
from tav_cli import benchmark
from tav_model.errors import TavError
from tests.support.tav_command import Tav

BALL, FISH = (
    Entry(of_set, clip, "a caption", {}, Path("frames"), "table")
    for of_set, clip in (("DAVIS", "ball"), ("yt", "fish"))
)
SCORES = {"style": {"flicker": 0.5, "psnr_to_truth": 20.0}, "object": {"flicker": 0.25}}
LOG = "results/benchmarks/tgve/benchmark.log"
Prepare = Callable[..., None]


@pytest.fixture
def prepare(monkeypatch: pytest.MonkeyPatch, new: Path) -> Prepare:
    """Replace the benchmark by one of two clips with these outcomes: up to date, done, an error, or an interrupt."""

    def replace(ball: Any, fish: Any) -> None:
        @contextlib.contextmanager
        def open_benchmark(root: Path, folder: Path, out: Path, overrides: Any, only: Any) -> Iterator[Any]:
            assert (root, folder, overrides, only) == (new, Path("tgve"), ["seed=1"], ["DAVIS/ball", "yt/fish"])
            out.mkdir(parents=True)
            up_to_date = [entry.name for entry, outcome in ((BALL, ball), (FISH, fish)) if outcome == "up to date"]
            scores = {}

            def results(events: EventStream, on_clip: Any) -> Iterator[ClipResult]:
                for entry, outcome in ((BALL, ball), (FISH, fish)):
                    if outcome != "up to date":
                        on_clip(entry)
                        state = {"clip": entry.clip, "stage": "tune", "total": 400, "unit": "step"}
                        for event in (LoopStarted(**state, done=0), LoopProgressed(**state, done=30)):
                            events.publish(event)
                    if isinstance(outcome, KeyboardInterrupt):
                        raise outcome
                    if isinstance(outcome, str):
                        scores[entry.name] = SCORES
                    yield ClipResult(entry, outcome if isinstance(outcome, Exception) else None)

            yield SimpleNamespace(
                chosen=[BALL, FISH],
                up_to_date=up_to_date,
                scores=scores,
                results=results,
                table=out / "results.csv",
                submission=out / "submission",
            )

        monkeypatch.setattr(benchmark, "open_benchmark", open_benchmark)

    return replace


ARGUMENTS = ("benchmark", "tgve", "--set", "seed=1", "--only", "DAVIS/ball", "--only", "yt/fish")


def log_lines(root: Path) -> list[str]:
    """The lines of the log without their times."""
    lines = (root / LOG).read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} ", line) for line in lines)
    return [line.partition(" ")[2] for line in lines]


def test_the_table_the_paths_and_the_progress(tav: Tav, prepare: Prepare, new: Path) -> None:
    prepare("up to date", "done")
    ended = tav(*ARGUMENTS)
    assert ended.code == 0
    lines = [line.split() for line in ended.out.splitlines()]
    assert ["style", "object", "background", "multiple", "all"] in lines and ["edits", "2", "2", "0", "0", "4"] in lines
    assert ["psnr_to_truth", "20.0", "dB", "20.0", "dB"] in lines and ["flicker", "0.500", "0.250", "0.375"] in lines
    assert ended.out.endswith(
        "scores of every edit: results/benchmarks/tgve/results.csv\n"
        "folder to submit:     results/benchmarks/tgve/submission/\n"
    )
    lines_of_stages = ["tune fish: starts, 0/400 steps"]
    assert [line for line in ended.err.splitlines() if line not in lines_of_stages] == log_lines(new)
    assert [re.sub(r"[\d.]+ s/clip", "N s/clip", line) for line in log_lines(new)] == [
        "benchmark: 2 clips, 1 of them up to date",
        "DAVIS/ball: up to date; 1/2 clips",
        "yt/fish: started",
        "yt/fish: done; 2/2 clips, N s/clip, 0:00:00 left",
        "benchmark: 2 clips up to date, 0 failed, in 0:00:00",
    ]


def test_failures_are_errors_of_one_line_with_the_traceback_in_the_log(tav: Tav, prepare: Prepare, new: Path) -> None:
    def defect() -> Exception:
        try:
            raise RuntimeError("first line\nsecond line")
        except RuntimeError as error:
            return error

    prepare(TavError("frames/00002.jpg: not an image that can be read"), defect())
    ended = tav(*ARGUMENTS, "--quiet")
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.splitlines() == [
        "error: DAVIS/ball: frames/00002.jpg: not an image that can be read",
        "error: yt/fish: first line",
        "2 of 2 clips failed; run the same command again to retry them",
    ]
    log = (new / LOG).read_text()
    assert 'raise RuntimeError("first line' in log and log.count("Traceback") == 1


def test_an_interrupt_says_how_to_resume(tav: Tav, prepare: Prepare, new: Path) -> None:
    prepare("done", KeyboardInterrupt())
    ended = tav(*ARGUMENTS, "--quiet")
    assert ended == (130, "", "stopped at 1/2 clips; run the same command again to resume\n")
    assert log_lines(new)[-1] == "stopped at 1/2 clips; run the same command again to resume"


def test_mistakes_are_refused_in_one_line(tav: Tav, new: Path) -> None:
    ended = tav("benchmark", "nowhere")
    assert ended.code == 2 and "nowhere: no such folder" in ended.error
    assert not (new / LOG).exists()


def test_terminals_get_a_bar_and_no_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.delenv("TAV_QUIET", raising=False)
    monkeypatch.setattr(benchmark, "Console", lambda stderr: Console(file=screen, force_terminal=True, width=120))
    with benchmark.BenchmarkProgress(tmp_path / "log", [BALL, FISH], []) as progress:
        (show_stage,) = progress.subscribers
        progress.clip_started(BALL)
        show_stage(LoopProgressed(clip="davis-ball", stage="tune", done=30, total=400, unit="step"))
        progress._bar.refresh()
        progress.clip_ended(ClipResult(BALL))
        progress.clip_ended(ClipResult(FISH, TavError("why")))
    assert "DAVIS/ball: tune 30/400" in screen.getvalue() and "2/2" in screen.getvalue()
    log = (tmp_path / "log").read_text()
    assert "yt/fish: failed: why; 2/2 clips" in log and "1 clips up to date, 1 failed" in log
