"""The report's figures as geometry: paths, ticks and small pictures, which the templates put into SVG."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tav.tracking.tuning_steps import SmoothedLoss

if TYPE_CHECKING:
    import numpy as np

MOST_CELLS = 96  # frames to a side of a heat map; of more, this many are chosen evenly
TICK_DISTANCE = 0.14  # of the length of a scale
MOST_ROWS = 48  # frames of the drawn attention
MOST_POINTS = 2000
SMOOTHED_OVER = 0.05  # of all steps: the standard deviation of the weights of the smoothed loss


@dataclass(frozen=True)
class HeatMap:
    """Similarities of frames with frames.

    Attributes:
        picture: a PNG of a pixel to a cell, as a data: URI.
        frames: the numbers of the frames on both sides, from 1.
        values: in ten-thousandths, row by row.
        mean: over the pairs of different frames; None for a single frame.
        lowest: the value of the pair that agrees least, and its two frames; None for a single frame.
    """

    picture: str
    frames: list[int]
    values: list[int]
    mean: float | None
    lowest: tuple[float, int, int] | None


@dataclass(frozen=True)
class HeatScale:
    """The colours of heat maps from left to right, as a PNG in a data: URI, and where on it (0 to 1) some values are."""

    picture: str
    ticks: list[tuple[float, str]]


@dataclass(frozen=True)
class Axis:
    """Ticks: places in the drawing, and what is written there."""

    ticks: list[tuple[float, str]]


@dataclass(frozen=True)
class LossChart:
    """The training loss on a logarithmic scale, and the learning rate below it.

    Attributes:
        width, height: of the drawing; the plot is from `left`, `top` to `right`, `bottom`.
        series: for each range of timesteps its name, the path of its points, and that of its smoothed line.
        smoothed: the path of the loss of all timesteps, smoothed.
        rate_top, rate_bottom, rate, rate_peak: where the learning rate is drawn, its path, its largest value.
    """

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int
    x: Axis
    y: Axis
    series: list[tuple[str, str, str]]
    smoothed: str
    rate_top: int
    rate_bottom: int
    rate: str
    rate_peak: str


@dataclass(frozen=True)
class AttentionGrid:
    """Which frames each frame sees.

    Attributes:
        frames: how many the clip has.
        shown: how many of them are drawn.
        cells: column, row and how often, each from 0.
        sees: in words, by row: the numbers of the frames, from 1.
        mean: how many frames one sees, on the average of all.
    """

    frames: int
    shown: int
    cells: list[tuple[int, int, int]]
    sees: list[str]
    mean: float


def heat_map(similarities: Sequence[Sequence[float]], low: float) -> HeatMap:
    """The heat map of one video on a scale from `low`, which is less than 1, to 1."""
    import numpy as np

    whole = np.asarray(similarities, np.float64)
    count = len(whole)
    size = min(count, MOST_CELLS)
    chosen = np.round(np.linspace(0, count - 1, size)).astype(int)
    mean = lowest = None
    if count > 1:
        rows, columns = np.triu_indices(count, 1)
        pairs = whole[rows, columns]
        least = int(pairs.argmin())
        mean = float(pairs.mean())
        lowest = float(pairs[least]), int(rows[least]) + 1, int(columns[least]) + 1
    cells = whole[np.ix_(chosen, chosen)]
    values = [round(10000 * value) for value in cells.ravel().tolist()]
    return HeatMap(_png(_colours(_shares(cells, low))), (chosen + 1).tolist(), values, mean, lowest)


def heat_scale(low: float) -> HeatScale:
    """The scale of heat maps from `low`, which is less than 1, to 1."""
    import numpy as np

    ticks: list[tuple[float, str]] = [(0.0, f"{low:g}")]
    for value in (0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 1.0):
        place = float(_shares(np.array(value), low))
        if value > low and place - ticks[-1][0] >= TICK_DISTANCE and (value == 1 or 1 - place >= TICK_DISTANCE):
            ticks.append((place, f"{value:g}"))
    return HeatScale(_png(_colours(np.linspace(0, 1, 128)[None])), ticks)


def _shares(values: np.ndarray, low: float) -> np.ndarray:
    """How far along the colours values are. Most are close to 1: the nearer to it, the finer they are told apart."""
    import numpy as np

    return 1 - np.sqrt(((1 - values) / (1 - low)).clip(0, 1))


def _colours(shares: np.ndarray) -> np.ndarray:
    """Cividis, which people see alike whatever colours they see: `h w` from 0 to 1 -> `h w 3` uint8."""
    import matplotlib

    return matplotlib.colormaps["cividis"](shares.clip(0, 1), bytes=True)[..., :3]


def _png(pixels: np.ndarray) -> str:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG", optimize=True)
    return data_uri("image/png", stream.getvalue())


def data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def loss_chart(steps: Sequence[dict[str, float]], width: int) -> LossChart:
    """The loss curve in a drawing of this width.

    Args:
        steps: `step`, `loss`, `learning_rate` and `timestep` of each, at least one.
    """
    left, right, top, bottom, rate_top, rate_bottom = 52, width - 12, 12, 212, 236, 276
    losses = [max(step["loss"], 1e-12) for step in steps]
    last = max(step["step"] for step in steps)
    low, high = math.log10(min(losses)), math.log10(max(losses))
    margin = 0.05 * (high - low) or 0.1
    low, high = low - margin, high + margin

    def x(step: float) -> float:
        return left + (right - left) * (step - 1) / max(last - 1, 1)

    def y(loss: float) -> float:
        return bottom - (bottom - top) * (math.log10(max(loss, 1e-12)) - low) / (high - low)

    every = math.ceil(len(steps) / MOST_POINTS)
    ranges: dict[str, list[tuple[float, float, float]]] = {}
    running = SmoothedLoss()
    for step in steps:
        ((name, value),) = running.update(step["loss"], step["timestep"]).items()
        ranges.setdefault(name, []).append((step["step"], step["loss"], value))
    series = []
    for low_step, high_step in SmoothedLoss.RANGES:
        rows = ranges.get(f"loss.timesteps_{low_step}_to_{high_step}", [])[::every]
        points = "".join(f"M{x(step):.1f} {y(loss):.1f}h0" for step, loss, _ in rows)
        series.append((f"{low_step} to {high_step}", points, _line([(x(s), y(v)) for s, _, v in rows])))

    rates = [step["learning_rate"] for step in steps]
    peak = max(rates)
    depth = (rate_bottom - rate_top) / (peak or 1)
    rate = [(x(step["step"]), rate_bottom - depth * step["learning_rate"]) for step in steps[::every]]
    smoothed = [(x(step["step"]), y(loss)) for step, loss in zip(steps, _smoothed(losses), strict=True)][::every]
    return LossChart(
        width=width,
        height=rate_bottom + 36,
        left=left,
        right=right,
        top=top,
        bottom=bottom,
        x=Axis([(x(tick), f"{tick:g}") for tick in _ticks(last, 4 if width < 500 else 8)]),
        y=Axis([(y(tick), f"{tick:g}") for tick in _log_ticks(10**low, 10**high)]),
        series=series,
        smoothed=_line(smoothed),
        rate_top=rate_top,
        rate_bottom=rate_bottom,
        rate=_line(rate),
        rate_peak=f"{peak:g}".replace("e-0", "e-"),
    )


def _smoothed(losses: Sequence[float]) -> list[float]:
    """Geometric means with Gaussian weights around each step: one large loss among small ones does not make a hill."""
    import numpy as np

    deviation = max(1.0, SMOOTHED_OVER * len(losses))
    reach = int(3 * deviation)
    weights = np.exp(-0.5 * np.square(np.arange(-reach, reach + 1) / deviation))
    # At both ends over the steps that there are.
    sums, shares = (np.convolve(values, weights) for values in (np.log(losses), np.ones(len(losses))))
    return np.exp(sums / shares)[reach : reach + len(losses)].tolist()


def _line(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) if points else ""


def _ticks(last: float, most: int) -> list[int]:
    """Round numbers up to `last`, with 1 as the first step."""
    if last <= most:
        return list(range(1, int(last) + 1))
    size = 10 ** math.floor(math.log10(last / most))
    size *= next(factor for factor in (1, 2, 5, 10) if last / (factor * size) <= most)
    return [1, *range(int(size), int(last) + 1, int(size))]


def _log_ticks(low: float, high: float) -> list[float]:
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if high / low > 1000 else (1, 3) if high / low > 20 else (1, 2, 5)
    return [t for e in exponents for f in factors if low <= (t := float(f"{f}e{e}")) <= high]


def attention_grid(attention: Any, frames: int) -> AttentionGrid:
    """Which of the frames each frame's keys and values come from.

    Args:
        attention: the names of `tav_model.networks.attention_plan.key_frames`.
    """
    from tav_model.networks.attention_plan import key_frames

    sources = key_frames(attention, frames)
    shown = min(frames, MOST_ROWS)
    cells = [
        (column, row, source.count(column))
        for row, source in enumerate(sources[:shown])
        for column in sorted(set(source))
        if column < shown
    ]
    sees = [", ".join(str(frame + 1) for frame in source) for source in sources[:shown]]
    return AttentionGrid(frames, shown, cells, sees, sum(len(set(source)) for source in sources) / frames)
