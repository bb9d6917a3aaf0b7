"""`tav compare`: print the MLflow runs of each clip as tables, or as JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tav.config.metrics import HEADLINES, METRICS, format_score
from tav.tracking.comparison import Comparison, as_rows, compare
from tav.tracking.run_names import readable_key, readable_value, tells
from tav.tracking.stored_runs import PipelineRun
from tav_cli.terminal import output_console, print_json

MAX_VALUE_LENGTH = 28  # characters of a parameter; a full negative prompt would fill the screen
SHORT_ID_LENGTH = 8
MIN_NAME_WIDTH = 24  # columns of a run's name; longer ones are wrapped where they would fill a third of the console


def show_comparisons(root: Path, clips: list[str], by: str | None, include_unscored: bool, as_json: bool) -> None:
    """Print the runs of each clip, best first.

    Args:
        root: the project's folder.
        clips: names; empty: all that have runs.
        by: the metric to order by; None: the first that there is, see `tav.tracking.comparison.compare`.
        include_unscored: also print runs without scores.
        as_json: print one JSON list instead of tables.

    Raises:
        TavError: as `tav.tracking.comparison.compare`.
    """
    comparisons = compare(root, clips, by, include_unscored)
    if as_json:
        print_json(as_rows(comparisons))
        return
    console = output_console()
    for comparison in comparisons:
        table, hidden = fitting_table(comparison, console)
        console.print(table)
        if hidden:
            columns = "column" if len(hidden) == 1 else "columns"
            console.print(f"{len(hidden)} more {columns}; --json prints everything", style="dim", highlight=False)
        if not comparison.has_same_edits:
            note = "not all runs are known to have the same edits, so their means may not be comparable"
            console.print(note, style="dim")
        if comparison.left_out:
            runs = "run" if comparison.left_out == 1 else "runs"
            console.print(f"{comparison.left_out} {runs} without scores left out; --all shows them", style="dim")


@dataclass(frozen=True)
class _Column:
    """A column that is shown if there is room for it.

    Attributes:
        name: what the column holds, as a note calls it.
        priority: columns with a lower number are the last to be left out.
    """

    name: str
    header: str
    cell: Callable[[PipelineRun], Text]
    priority: int
    justify: Literal["left", "right"] = "left"


def fitting_table(comparison: Comparison, console: Console) -> tuple[Table, list[str]]:
    """Return a table with as many columns as the console has room for, and the names of the others."""
    columns = _columns(comparison)
    name_width = max(MIN_NAME_WIDTH, console.width // 3)
    unbounded = console.options.update(max_width=10_000)
    shown: list[_Column] = []
    for column in sorted(columns, key=lambda column: column.priority):
        wider = [one for one in columns if one in shown or one is column]
        if console.measure(_table(comparison, wider, name_width), options=unbounded).maximum <= console.width:
            shown = wider
    return _table(comparison, shown, name_width), [column.name for column in columns if column not in shown]


def _columns(comparison: Comparison) -> list[_Column]:
    """Return all columns from left to right: parameters, scores (the one that orders the runs first), and the rest."""
    columns = [
        _parameter_column(key, comparison.runs) for key in dict.fromkeys(map(readable_key, comparison.differing))
    ]
    columns += [
        _score_column(metric, comparison)
        for metric in sorted(comparison.metrics, key=lambda metric: metric != comparison.by)
    ]
    if not comparison.has_same_edits:
        columns.append(_Column("edits", "edits", lambda run: Text(str(run.edits or "-")), 1, "right"))
    columns.append(_Column("when", "when", lambda run: Text(f"{run.started:%Y-%m-%d %H:%M}"), priority=6))
    if any(_state(run) for run in comparison.runs):
        columns.append(_Column("state", "state", lambda run: Text(_state(run), style="yellow"), priority=1))
    columns.append(_Column("run id", "run id", lambda run: Text(run.run_id[:SHORT_ID_LENGTH], style="dim"), priority=5))
    return columns


def _parameter_column(key: str, runs: list[PipelineRun]) -> _Column:
    """Return the column of a parameter, which says more than a second score does, unless the runs' names tell it."""
    is_told = all(tells(run.name, key, run.parameters) for run in runs)
    return _Column(key, key.replace(".", ".\n", 1), _parameter_cell(key), priority=4 if is_told else 2)


def _score_column(metric: str, comparison: Comparison) -> _Column:
    arrow = (" ↑" if METRICS[metric].higher_is_better else " ↓") if metric in METRICS else ""
    header = _label(metric).replace(" ", "\n", 1) + arrow
    is_headline = metric in (headline.key for headline in HEADLINES)
    priority = 0 if metric == comparison.by else 3 if is_headline else 6
    return _Column(metric, header, _score_cell(metric, comparison.best(metric)), priority, "right")


def _label(metric: str) -> str:
    """Return a metric's label; the name itself of one that is not in the catalogue, as those of other versions."""
    return METRICS[metric].label if metric in METRICS else metric


def _table(comparison: Comparison, columns: list[_Column], name_width: int) -> Table:
    order = f", best {_label(comparison.by)} first" if comparison.by else ""
    title = Text(f"{comparison.clip}{order}", style="bold")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, header_style="")
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("run", max_width=name_width, vertical="bottom")
    for column in columns:
        table.add_column(Text(column.header), justify=column.justify, no_wrap=True, vertical="bottom")
    for rank, run in enumerate(comparison.runs, 1):
        table.add_row(str(rank), Text(run.name), *(column.cell(run) for column in columns))
    return table


def _parameter_cell(key: str) -> Callable[[PipelineRun], Text]:
    def cell(run: PipelineRun) -> Text:
        value = " ".join((readable_value(key, run.parameters) or "-").split())
        return Text(value if len(value) <= MAX_VALUE_LENGTH else f"{value[: MAX_VALUE_LENGTH - 1]}…")

    return cell


def _score_cell(metric: str, best: float | None) -> Callable[[PipelineRun], Text]:
    def cell(run: PipelineRun) -> Text:
        if metric not in run.scores:
            return Text("-", style="dim")
        value = run.scores[metric]
        return Text(format_score(metric, value), style="bold green" if value == best else "")

    return cell


def _state(run: PipelineRun) -> str:
    """Return what distinguishes the run from a finished one; empty for those."""
    if not run.has_scores:
        return f"no scores ({run.status})"
    return "" if run.status == "finished" else run.status
