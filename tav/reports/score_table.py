"""The scores of clips as one table that fits the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.table import Table
from rich.text import Text

from tav.config import load_params
from tav.config.metrics import HEADLINES, Metric
from tav.config.paths import Project
from tav.config.prompt_words import load_vocabulary
from tav.config.prompts import read_prompts
from tav.reports.remarks import edit_remarks
from tav.reports.scores import Scores, read_clip_scores
from tav_model.errors import TavError

MIN_NAME_WIDTH = 12  # columns of an edit's name, however narrow the terminal is
GAP = 2  # spaces after a column


def score_table(root: Path, clips: Sequence[str]) -> RenderableType:
    """Return a table with the main scores of each clip: its source, its edits in the order of its CSV, and their mean.

    Below it are what is wrong with edits, and the paths of the videos, the contact sheet and the report, which has all
    scores.

    Raises:
        TavError: None of the clips has scores, or a file with scores is damaged.
    """
    project = Project(root)
    scores = {clip: read_clip_scores(project.scores(clip)) for clip in clips}
    scored = {clip: values for clip, values in scores.items() if values is not None}
    if not scored:
        raise TavError(f"no scores yet for {', '.join(clips)}; run dvc repro")
    present = {key for values in scored.values() for key in values.mean}
    columns = [metric for metric in HEADLINES if metric.key in present]
    blocks = [_Block(clip, values, _names(root, clip, values)) for clip, values in scored.items()]
    remarks = [line for clip, values in scored.items() for line in remark_lines(root, clip, values)]
    return Group(
        _ScoreTable(blocks, columns),
        *([Text("\n".join([*remarks, ""]))] if remarks else []),
        _paths(project, list(scored), len(present) - len(columns)),
    )


def _names(root: Path, clip: str, scores: Scores) -> list[tuple[str, str]]:
    """Return name and prompt of each scored edit: in the order of the CSV, then those that are not in it any more."""
    try:
        rows = read_prompts(root / load_params(root / "params.yaml").clip(clip).prompts)
    except TavError:
        rows = []
    listed = [(row.name, row.prompt) for row in rows if (row.name, row.prompt) in scores.edits]
    return listed + [edit for edit in scores.edits if edit not in listed]


@dataclass(frozen=True)
class _Block:
    """The rows of one clip."""

    clip: str
    scores: Scores
    edits: list[tuple[str, str]]


@dataclass(frozen=True)
class _ScoreTable:
    """A table whose names are wrapped at hyphens, so that the scores fit beside them."""

    blocks: Sequence[_Block]
    columns: Sequence[Metric]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        headers = [_header(metric) for metric in self.columns]
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, GAP, 0, 0), header_style="")
        # A column is followed by its padding and a space of the box, which also has a space at each edge.
        taken = 2 + GAP + sum(max(map(len, header.splitlines())) + GAP + 1 for header in headers)
        table.add_column(Text(self.blocks[0].clip if len(self.blocks) == 1 else "", style="bold"), vertical="bottom")
        for header in headers:
            table.add_column(header, justify="right", no_wrap=True, vertical="bottom")
        for block in self.blocks:
            self._add(table, block, max(MIN_NAME_WIDTH, options.max_width - taken))
        yield table

    def _add(self, table: Table, block: _Block, width: int) -> None:
        best = block.scores.best()
        if len(self.blocks) > 1:
            table.add_row(Text(block.clip, style="bold"))
        table.add_row("(source)", *self._cells(block.scores.source, {}), style="dim")
        for name, prompt in block.edits:
            wrapped = "\n".join(textwrap.wrap(name, width))  # at hyphens, where Rich would break anywhere
            table.add_row(Text(wrapped), *self._cells(block.scores.of(name, prompt), best))
        table.add_row("(mean)", *self._cells(block.scores.mean, {}), end_section=True)

    def _cells(self, scores: Mapping[str, float], best: Mapping[str, str]) -> list[Text]:
        cells = []
        for metric in self.columns:
            text = metric.text(scores[metric.key]) if metric.key in scores else ""
            cells.append(Text(text, style="bold green" if text and best.get(metric.key) == text else ""))
        return cells


def _header(metric: Metric) -> str:
    """Return the label on two lines, with an arrow that points to what is better."""
    return "\n".join(metric.label.split(" ", 1)) + (" ↑" if metric.higher_is_better else " ↓")


def _paths(project: Project, clips: Sequence[str], hidden: int) -> Table:
    """Return where the results are, and what the report has beyond the table."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column()
    grid.add_column(overflow="fold")
    more = f" (and {hidden} more {'score' if hidden == 1 else 'scores'})" if hidden else ""

    def report(clip: str) -> str:
        path = project.report(clip)
        return f"{path.relative_to(project.root)}{more}" if path.exists() else f"not written yet; run tav report {clip}"

    if len(clips) == 1:
        (clip,) = clips
        grid.add_row("videos", f"{project.edits(clip).relative_to(project.root)}/")
        grid.add_row("picture", str(project.contact_sheet(clip).relative_to(project.root)))
        grid.add_row("report", report(clip))
    else:
        for clip in clips:
            grid.add_row(clip, report(clip))
    return grid


def remark_lines(root: Path, clip: str, scores: Scores) -> list[str]:
    """Return a line for each edit that has something wrong: its name, and what its prompt or its scores say.

    Raises:
        TavError: a damaged file.
    """
    base_model = load_params(root / "params.yaml").for_clip(clip).base_model
    vocabulary = load_vocabulary(root, base_model)
    return [
        f"! {clip} {name}: {'; '.join(remarks)}"
        for (name, prompt), own in scores.edits.items()
        if (remarks := edit_remarks(prompt, own, scores.source, vocabulary, base_model))
    ]
