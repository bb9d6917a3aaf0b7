"""`tav benchmark`: runs `flows.benchmark`, shows its progress, and prints the table of scores."""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from types import TracebackType

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from flows.benchmark import BenchmarkRun, ClipResult, category_means, open_benchmark, table_cells
from tav.media.loveu_tgve import Entry
from tav.runtime.exit_status import RESUMABLE, ExitStatus
from tav.runtime.progress import is_quiet
from tav_cli.terminal import output_console, print_error, print_message, print_notice
from tav_model.errors import TavError, first_line

LOG = "benchmark.log"


def benchmark(root: Path, folder: Path, out: Path, overrides: Sequence[str], only: Sequence[str]) -> ExitStatus:
    """Bring the clips of the benchmark in `folder` up to date in `out`, and print the table of their scores.

    Args:
        root: the project whose params.yaml applies.
        folder: the unpacked data set.
        out: the folder for results and the submission.
        overrides: `KEY=VALUE`, parameters that differ from params.yaml.
        only: names SET/CLIP of the clips to work on; empty: all. The table covers every clip that is up to date.

    Raises:
        TavError: as `flows.benchmark.open_benchmark`, before any work.
    """
    failed: list[ClipResult] = []
    with open_benchmark(root, folder, out, overrides, only) as run:
        with BenchmarkProgress(out / LOG, run.chosen, run.up_to_date) as progress:
            try:
                for result in run.results(progress):
                    progress.clip_ended(result)
                    if result.error is not None:
                        failed.append(result)
            except KeyboardInterrupt:
                progress.interrupted()
                return ExitStatus.INTERRUPTED
        _print_results(run)
    for result in failed:
        print_error(f"{result.entry.name}: {first_line(result.error)}")
    if not failed:
        return ExitStatus.SUCCESS
    print_notice(f"{len(failed)} of {len(run.chosen)} clips failed; run the same command again to retry them")
    return ExitStatus.FAILED


def _print_results(run: BenchmarkRun) -> None:
    if run.scores:
        console = output_console()
        console.print(_means_table(category_means(run.scores.values())))
        console.print(f"scores of every edit: {run.table}\nfolder to submit:     {run.submission}/")


def _means_table(means: Mapping[str, Mapping[str, float]]) -> Table:
    header, *rows = table_cells(means)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(header[0])
    for category in header[1:]:
        table.add_column(category, justify="right", style="bold" if category == "all" else "")
    for row in rows:
        table.add_row(*row)
    return table


class BenchmarkProgress:
    """The progress of a benchmark: a bar on a terminal, lines elsewhere, and lines with a time in a log file.

    On a terminal the bar names the current stage, and the stages' own bars are off. A `flows.benchmark.Observer`.

    Args:
        clips: those to work on.
        up_to_date: names of those that were up to date from the start.
    """

    def __init__(self, log: Path, clips: Sequence[Entry], up_to_date: Sequence[str]) -> None:
        self._log, self._total, self._up_to_date = log, len(clips), set(up_to_date)
        self._ended, self._ran, self._failed, self._to_run = 0, 0, 0, len(clips) - len(up_to_date)
        self._clip = ""
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._exit_stack = contextlib.ExitStack()

    def __enter__(self) -> BenchmarkProgress:
        self._start = time.monotonic()
        self._print(f"benchmark: {self._total} clips, {len(self._up_to_date)} of them up to date")
        if self._console.is_terminal and not is_quiet():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[pace]}"), console=self._console)
            self._task = self._bar.add_task("benchmark", total=self._total, pace="")
            self._exit_stack.enter_context(self._bar)
            self._exit_stack.callback(os.environ.pop, "TAV_QUIET", None)
            os.environ["TAV_QUIET"] = "1"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._exit_stack.close()
        if error is None and self._ended == self._total:
            seconds = timedelta(seconds=round(time.monotonic() - self._start))
            self._print(
                f"benchmark: {self._ended - self._failed} clips up to date, {self._failed} failed, in {seconds}"
            )

    def clip_started(self, entry: Entry) -> None:
        """Report the clip that runs from now on."""
        self._clip = entry.name
        self._print(f"{entry.name}: started")

    def stage_advanced(self, stage: str, done: int, total: int) -> None:
        """Show how far a stage of the current clip is; `total` 0: unknown."""
        if self._bar is not None:
            self._bar.update(self._task, description=f"{self._clip}: {stage} {done}{f'/{total}' if total else ''}")

    def clip_ended(self, result: ClipResult) -> None:
        """Report a clip that is done, was up to date, or failed; with the traceback in the log, unless it is a mistake."""
        name, error = result.entry.name, result.error
        self._ended += 1
        self._ran += name not in self._up_to_date
        if error is not None:
            self._failed += 1
            if not isinstance(error, TavError):
                self._write_log("".join(traceback.format_exception(error)).rstrip())
            outcome = f"failed: {first_line(error)}"
        else:
            outcome = "up to date" if name in self._up_to_date else "done"
        pace = self._pace()
        self._print(f"{name}: {outcome}; {self._ended}/{self._total} clips{f', {pace}' if pace else ''}")
        if self._bar is not None:
            self._bar.update(self._task, completed=self._ended, pace=pace, description=name)

    def interrupted(self) -> None:
        """Report that the user stopped the run."""
        self._exit_stack.close()
        self._bar = None
        message = RESUMABLE.replace("stopped", f"stopped at {self._ended}/{self._total} clips")
        self._write_log(message)
        print_notice(message)

    def _pace(self) -> str:
        """Return the mean time of a clip that ran, and what it predicts for those that are left."""
        if not self._ran:
            return ""
        seconds = (time.monotonic() - self._start) / self._ran
        left = timedelta(seconds=round(seconds * (self._to_run - self._ran)))
        return f"{seconds:.1f} s/clip, {left} left"

    def _print(self, text: str) -> None:
        self._write_log(text)
        if self._bar is None:
            print_message(text)

    def _write_log(self, text: str) -> None:
        with self._log.open("a", encoding="utf-8") as file:
            file.write(f"{datetime.now().astimezone():%Y-%m-%dT%H:%M:%S%z} {text}\n")
