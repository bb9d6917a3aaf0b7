"""Contact sheets: a row for each video, frames that are separate from the paper."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from tav.media.contact_sheet import LINE, write_contact_sheet
from tests.support.videos import moving_square


def test_a_contact_sheet_has_a_row_for_each_video(tmp_path: Path) -> None:
    rows = [("the source", moving_square()), ("ein Würfel, 立方体 " * 30, 255 - moving_square())]
    write_contact_sheet(tmp_path / "one.png", rows[:1])
    write_contact_sheet(tmp_path / "two.png", rows)
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "two.png") as two:
        assert one.width == two.width and two.height > one.height * 1.4


def test_white_frames_are_separate_from_the_paper(tmp_path: Path) -> None:
    write_contact_sheet(tmp_path / "a.png", [("snow", np.full((3, 64, 96, 3), 255, np.uint8))])
    with Image.open(tmp_path / "a.png") as image:
        row = np.asarray(image)[image.height // 2]
    assert ((row == LINE).all(axis=1)).sum() == 2 * 3
