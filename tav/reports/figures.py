"""The geometry of the report's figures: paths, ticks and small images, which the templates put into SVG."""

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

MAX_CELLS = 96  # frames on each side of a heat map; longer clips are sampled evenly
MIN_TICK_DISTANCE = 0.14  # as a share of the scale's length
MAX_ROWS = 48  # frames in the drawing of the attention
MAX_POINTS = 2000  # of a curve
SMOOTHING_WIDTH = 0.05  # standard deviation of the smoothed loss's weights, as a share of all steps


@dataclass(frozen=True)
class HeatMap:
    """The similarities between the frames of a video.

    Attributes:
        image: a PNG with one pixel per cell, as a data: URI.
        frames: the numbers of the frames on both sides, from 1.
        values: the similarities in ten-thousandths, row by row.
        mean: over the pairs of different frames; None for a single frame.
        lowest: the value of the least similar pair, and its two frames; None for a single frame.
    """

    image: str
    frames: list[int]
    values: list[int]
    mean: float | None
    lowest: tuple[float, int, int] | None


@dataclass(frozen=True)
class HeatScale:
    """The colour scale of heat maps.

    Attributes:
        image: the colours from left to right, a PNG as a data: URI.
        ticks: positions on the scale, from 0 to 1, and their labels.
    """

    image: str
    ticks: list[tuple[float, str]]


@dataclass(frozen=True)
class Axis:
    """An axis with ticks: their positions in the drawing, and their labels."""

    ticks: list[tuple[float, str]]


@dataclass(frozen=True)
class LossChart:
    """The training loss on a logarithmic scale, and the learning rate below it.

    Attributes:
        width, height: the size of the drawing; the plot extends from `left`, `top` to `right`, `bottom`.
        series: for each range of timesteps its name, the path of its points, and the path of its smoothed line.
        smoothed: the path of the smoothed loss of all timesteps.
        rate_top, rate_bottom, rate, rate_peak: the extent of the learning rate's plot, its path, its largest value.
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
    """The frames that each frame attends to.

    Attributes:
        frames: the number of frames in the clip.
        rows: the number of frames that are drawn.
        cells: column and row, from 0, and how often the row's frame attends to the column's.
        attended: for each row, the numbers of the frames it attends to, from 1, as a text.
        mean: the mean number of frames that a frame attends to.
    """

    frames: int
    rows: int
    cells: list[tuple[int, int, int]]
    attended: list[str]
    mean: float


def heat_map(similarities: Sequence[Sequence[float]], low: float, num_frames: int | None = None) -> HeatMap:
    """Return the heat map of a video's similarities.

    Args:
        similarities: of each frame with each, `f f`.
        low: the lower end of the colour scale, less than 1; the upper end is 1.
        num_frames: of the video, where the similarities are those of some of its frames, evenly spaced.
    """
    import numpy as np

    matrix = np.asarray(similarities, np.float64)
    count = len(matrix)
    size = min(count, MAX_CELLS)
    chosen = np.round(np.linspace(0, count - 1, size)).astype(int)
    numbers = np.round(np.linspace(0, max(num_frames or 0, count) - 1, count)).astype(int) + 1
    mean = lowest = None
    if count > 1:
        rows, columns = np.triu_indices(count, 1)
        pairs = matrix[rows, columns]
        minimum = int(pairs.argmin())
        mean = float(pairs.mean())
        lowest = float(pairs[minimum]), int(numbers[rows[minimum]]), int(numbers[columns[minimum]])
    cells = matrix[np.ix_(chosen, chosen)]
    values = [round(10000 * value) for value in cells.ravel().tolist()]
    return HeatMap(_png(_colours(_positions(cells, low))), numbers[chosen].tolist(), values, mean, lowest)


def heat_scale(low: float) -> HeatScale:
    """Return the colour scale of heat maps from `low`, which is less than 1, to 1."""
    import numpy as np

    ticks: list[tuple[float, str]] = [(0.0, f"{low:g}")]
    for value in (0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 1.0):
        place = float(_positions(np.array(value), low))
        if value > low and place - ticks[-1][0] >= MIN_TICK_DISTANCE and (value == 1 or 1 - place >= MIN_TICK_DISTANCE):
            ticks.append((place, f"{value:g}"))
    return HeatScale(_png(_colours(np.linspace(0, 1, 128)[None])), ticks)


def _positions(values: np.ndarray, low: float) -> np.ndarray:
    """Return the positions of values on the colour scale, which is finer towards 1, where most values are."""
    import numpy as np

    return 1 - np.sqrt(((1 - values) / (1 - low)).clip(0, 1))


def _colours(positions: np.ndarray) -> np.ndarray:
    """Apply the colour map cividis, which also suits colour-blind viewers: `h w` in [0, 1] -> `h w 3` uint8."""
    import matplotlib

    return matplotlib.colormaps["cividis"](positions.clip(0, 1), bytes=True)[..., :3]


def _png(pixels: np.ndarray) -> str:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG", optimize=True)
    return data_uri("image/png", stream.getvalue())


def data_uri(media_type: str, content: bytes) -> str:
    """Return a data: URI that contains a file."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def loss_chart(steps: Sequence[dict[str, float]], width: int) -> LossChart:
    """Return the loss curve.

    Args:
        steps: `step`, `loss`, `learning_rate` and `timestep` of each step, at least one.
        width: of the drawing, in pixels.
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

    stride = math.ceil(len(steps) / MAX_POINTS)
    ranges: dict[str, list[tuple[float, float, float]]] = {}
    smoothed_loss = SmoothedLoss()
    for step in steps:
        ((name, value),) = smoothed_loss.update(step["loss"], step["timestep"]).items()
        ranges.setdefault(name, []).append((step["step"], step["loss"], value))
    series = []
    for low_step, high_step in SmoothedLoss.RANGES:
        rows = ranges.get(f"loss.timesteps_{low_step}_to_{high_step}", [])[::stride]
        points = "".join(f"M{x(step):.1f} {y(loss):.1f}h0" for step, loss, _ in rows)
        series.append((f"{low_step} to {high_step}", points, _line([(x(s), y(v)) for s, _, v in rows])))

    rates = [step["learning_rate"] for step in steps]
    peak = max(rates)
    depth = (rate_bottom - rate_top) / (peak or 1)
    rate = [(x(step["step"]), rate_bottom - depth * step["learning_rate"]) for step in steps[::stride]]
    smoothed = [(x(step["step"]), y(loss)) for step, loss in zip(steps, _smoothed(losses), strict=True)][::stride]
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
        rate_peak=f"{peak:.2g}".replace("e-0", "e-"),
    )


def _smoothed(losses: Sequence[float]) -> list[float]:
    """Return geometric means with Gaussian weights around each step, on which single large losses have little effect."""
    import numpy as np

    deviation = max(1.0, SMOOTHING_WIDTH * len(losses))
    reach = int(3 * deviation)
    weights = np.exp(-0.5 * np.square(np.arange(-reach, reach + 1) / deviation))
    # Near both ends, the weights of the existing steps are normalised.
    sums, totals = (np.convolve(values, weights) for values in (np.log(losses), np.ones(len(losses))))
    return np.exp(sums / totals)[reach : reach + len(losses)].tolist()


def _line(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) if points else ""


def _ticks(last: float, max_count: int) -> list[int]:
    """Return round numbers up to `last`, and 1, the first step."""
    if last <= max_count:
        return list(range(1, int(last) + 1))
    size = 10 ** math.floor(math.log10(last / max_count))
    size *= next(factor for factor in (1, 2, 5, 10) if last / (factor * size) <= max_count)
    return [1, *range(int(size), int(last) + 1, int(size))]


def _log_ticks(low: float, high: float) -> list[float]:
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if high / low > 1000 else (1, 3) if high / low > 20 else (1, 2, 5)
    return [t for e in exponents for f in factors if low <= (t := float(f"{f}e{e}")) <= high]


def attention_grid(attention: Any, frames: int) -> AttentionGrid:
    """Return the frames that each frame's keys and values come from.

    Args:
        attention: names of frames, as for `tav_model.networks.attention_plan.key_frames`.
        frames: the number of frames in the clip.
    """
    from tav_model.networks.attention_plan import key_frames

    sources = key_frames(attention, frames)
    rows = min(frames, MAX_ROWS)
    cells = [
        (column, row, source.count(column))
        for row, source in enumerate(sources[:rows])
        for column in sorted(set(source))
        if column < rows
    ]
    attended = [", ".join(str(frame + 1) for frame in source) for source in sources[:rows]]
    return AttentionGrid(frames, rows, cells, attended, sum(len(set(source)) for source in sources) / frames)
