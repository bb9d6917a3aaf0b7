"""What the benchmarks have in common: figures with targets, and tables of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tav_model.files import write_json

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Measure:
    """A figure, and its target if it has one.

    Attributes:
        part: what was measured, such as a part of the model.
        name: the figure.
        value: its value; a share if `percent`.
        target: the value to reach, or None if the figure is only for information.
        at_most: the target is an upper bound rather than a lower one.
        percent: print value and target in per cent.
        interval: the 95 % interval of the value, if it is a mean over clips.
    """

    part: str
    name: str
    value: float
    target: float | None = None
    at_most: bool = False
    percent: bool = True
    interval: tuple[float, float] | None = None

    @property
    def reached(self) -> bool:
        """Whether the target is reached; True if there is none."""
        if self.target is None:
            return True
        return self.value <= self.target if self.at_most else self.value >= self.target

    def cells(self) -> list[str]:
        """Return the measure as a row of `table`."""
        value = self._format(self.value)
        if self.interval is not None:
            value += f" [{', '.join(map(self._format, self.interval))}]"
        if self.target is None:
            return [self.part, self.name, value, "", ""]
        target = f"{'at most' if self.at_most else 'at least'} {self._format(self.target)}"
        return [self.part, self.name, value, target, "yes" if self.reached else "NO"]

    def _format(self, value: float) -> str:
        return f"{100 * value:.1f} %" if self.percent else f"{value:.3g}"


def table(measures: Sequence[Measure]) -> str:
    """Return the measures as a Markdown table."""
    return markdown([["part", "measured", "value", "target", "reached"], *(measure.cells() for measure in measures)])


def write_measures(path: Path, measures: Sequence[Measure]) -> None:
    """Write the measures as JSON, each with whether its target is reached."""
    write_json(path, [dataclasses.asdict(measure) | {"reached": measure.reached} for measure in measures])


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with aligned columns; the first row is its header."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
