"""The geometry of the report's figures."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from tav.reports.figures import MAX_CELLS, MAX_ROWS, attention_grid, heat_map, heat_scale, loss_chart
from tav_model.networks.attention_plan import key_frames


def pixels_of(uri: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as picture:
        return np.asarray(picture)


def test_a_heat_map_gets_lighter_with_the_similarity() -> None:
    values = [[1.0, 0.9, 0.5], [0.9, 1.0, 0.99], [0.5, 0.99, 1.0]]
    map_ = heat_map(values, 0.5)
    assert map_.mean == pytest.approx((0.9 + 0.5 + 0.99) / 3) and map_.lowest == (0.5, 1, 3)
    assert map_.values == [10000, 9000, 5000, 9000, 10000, 9900, 5000, 9900, 10000] and map_.frames == [1, 2, 3]
    pixels = pixels_of(map_.image).astype(int)
    assert pixels.shape == (3, 3, 3)
    light = pixels.sum(-1)
    assert light[0, 2] < light[0, 1] < light[1, 2] < light[0, 0]
    scale = heat_scale(0.5)
    ends = pixels_of(scale.image)[0, [0, -1]]
    assert (ends == pixels[[0, 0], [2, 0]]).all()
    assert [text for _, text in scale.ticks][:: len(scale.ticks) - 1] == ["0.5", "1"]
    positions = [position for position, _ in scale.ticks]
    assert positions == sorted(positions) and positions[0] == 0 and positions[-1] == 1


def test_heat_maps_of_one_and_of_many_frames() -> None:
    one = heat_map([[1.0]], 0.95)
    assert one.mean is None and one.lowest is None and pixels_of(one.image).shape == (1, 1, 3)
    count = 3 * MAX_CELLS
    many = heat_map(np.ones((count, count)), 0.95)
    assert len(many.frames) == MAX_CELLS and (many.frames[0], many.frames[-1]) == (1, count)
    assert len(many.values) == MAX_CELLS**2 and many.mean == 1


@pytest.mark.parametrize(
    "attention", [("first", "former"), ("self",), ("all",), ("former", "former", "next"), ("middle",)]
)
@pytest.mark.parametrize("frames", [1, 8, MAX_ROWS + 2])
def test_the_grid_shows_the_frames_that_attention_takes(attention: tuple[str, ...], frames: int) -> None:
    grid = attention_grid(attention, frames)
    sources = key_frames(attention, frames)
    drawn = {(row, column): count for column, row, count in grid.cells}
    assert grid.rows == min(frames, MAX_ROWS)
    for row in range(grid.rows):
        expected = {column: sources[row].count(column) for column in sources[row] if column < grid.rows}
        assert {column: count for (one, column), count in drawn.items() if one == row} == expected
        assert grid.attended[row] == ", ".join(str(frame + 1) for frame in sources[row])
    assert grid.mean == np.mean([len(set(source)) for source in sources])


def numbers(path: str) -> np.ndarray:
    """The points of a path, n 2."""
    return np.array(re.findall(r"[ML]?(-?[\d.]+) (-?[\d.]+)", path), float)


@pytest.mark.parametrize("count", [1, 2, 400, 5000])
@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_the_loss_stays_in_its_frame(count: int, spread: float) -> None:
    rng = np.random.default_rng(count)
    steps = [
        {
            "step": n + 1,
            "loss": 0.01 * 10 ** rng.normal(0, spread),
            "learning_rate": 3e-5,
            "timestep": rng.integers(1000),
        }
        for n in range(count)
    ]
    chart = loss_chart(steps, 400)
    points = [numbers(path) for _, path, _ in chart.series if path]
    assert sum(map(len, points)) == (count if count <= 2000 else pytest.approx(count / 3, abs=4))
    for path in (*points, *(numbers(line) for _, _, line in chart.series if line), numbers(chart.smoothed)):
        assert (path[:, 0] >= chart.left).all() and (path[:, 0] <= chart.right).all()
        assert (path[:, 1] >= chart.top).all() and (path[:, 1] <= chart.bottom).all()
    rate = numbers(chart.rate)
    assert (rate[:, 1] == chart.rate_top).all() and chart.rate_peak == "3e-5"
    assert all(chart.left <= place <= chart.right for place, _ in chart.x.ticks) and chart.x.ticks[0][1] == "1"
    assert len(chart.y.ticks) >= 1 or spread == 0


def test_heat_map_of_some_frames_has_their_numbers() -> None:
    values = np.ones((3, 3))
    values[0, 2] = values[2, 0] = 0.5
    map_ = heat_map(values, 0.0, 201)
    assert map_.frames == [1, 101, 201] and map_.lowest == (0.5, 1, 201)
