import csv
from pathlib import Path

import av
import numpy as np
import pytest

from toyworld.sample import CAPTION, EDITS, draw_clip, main

DATA = Path(__file__).resolve().parents[2] / "data"


def decode(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == 12
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return draw_clip()


def test_committed_clip_shows_what_is_drawn(frames: np.ndarray):
    committed = decode(DATA / "ball.mp4")
    assert committed.shape == frames.shape == (24, 256, 256, 3)
    assert np.abs(committed.astype(int) - frames).mean() < 3
    assert (DATA / "ball.mp4").stat().st_size < 100_000


def test_the_ball_is_red_bounces_twice_and_crosses_the_picture(frames: np.ndarray):
    red, green, blue = np.moveaxis(frames.astype(int), -1, 0)
    is_ball = (red > 2 * green) & (red > 2 * blue) & (red > 60)
    places = np.stack([np.argwhere(picture).mean(axis=0) for picture in is_ball])
    down, right = places.T
    assert (np.diff(right) > 0).all() and right[0] < 64 and right[-1] > 192
    touches = [i for i in range(1, 23) if down[i] > max(down[i - 1], down[i + 1])]
    assert touches == [12] and down[0] > 180
    assert down.min() < 110


def test_command_writes_the_clip_and_one_edit_of_each_category(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(tmp_path / "new")]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "new" / name) for name in ("ball.mp4", "ball.csv")]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["ball.csv", "ball.mp4"]
    assert (tmp_path / "new" / "ball.csv").read_bytes() == (DATA / "ball.csv").read_bytes()
    assert decode(tmp_path / "new" / "ball.mp4").shape == (24, 256, 256, 3)
    with (DATA / "ball.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [tuple(row.values()) for row in rows] == list(EDITS)
    assert {row["category"] for row in rows} == {"object", "background", "style", "multiple"}
    assert CAPTION not in {row["prompt"] for row in rows}


def test_an_unwritable_folder_is_one_line_of_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").touch()
    assert main([str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'file'}: cannot be written")
