"""Draw a contact sheet: frames of several videos on one image, a row for each video."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tav_model.files import atomic_file

if TYPE_CHECKING:
    import numpy as np
    from PIL import ImageFont

# Pixels: the longer side of a frame, the space between frames, around the sheet, and the height of a label.
CELL, GAP, MARGIN, LABEL = 168, 6, 24, 34
INK, PAPER, LINE = (32, 33, 36), (255, 255, 255), (226, 228, 232)


def write_contact_sheet(path: Path, rows: Sequence[tuple[str, np.ndarray]], columns: int = 8) -> None:
    """Write a PNG with a row of evenly spaced frames for each video, and the video's label above the row.

    Args:
        path: the image to write.
        rows: a label and the frames, `f h w 3` in uint8, of each video. The first one sets the aspect ratio.
        columns: frames in a row, at most.
    """
    from PIL import Image, ImageDraw

    font = _font("".join(text for text, _ in rows))
    columns = min(columns, max(len(frames) for _, frames in rows))
    height, width = rows[0][1].shape[1:3]
    scale = CELL / max(height, width)
    cell = (max(1, round(width * scale)), max(1, round(height * scale)))
    row_height = LABEL + cell[1] + 2 * GAP
    sheet_width = 2 * MARGIN + columns * cell[0] + (columns - 1) * GAP
    sheet = Image.new("RGB", (sheet_width, 2 * MARGIN + len(rows) * row_height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, (text, frames) in enumerate(rows):
        top = MARGIN + number * row_height
        if number:
            draw.line([(MARGIN, top), (sheet_width - MARGIN, top)], fill=LINE)
        draw.text((MARGIN, top + 9), _shortened(text, font, sheet_width - 2 * MARGIN), fill=INK, font=font)
        chosen = [round(i * (len(frames) - 1) / max(columns - 1, 1)) for i in range(min(columns, len(frames)))]
        for column, index in enumerate(chosen):
            image = Image.fromarray(frames[index]).resize(cell, Image.Resampling.LANCZOS)
            left, upper = MARGIN + column * (cell[0] + GAP), top + LABEL
            # The outline separates a white frame from the white paper.
            draw.rectangle((left - 1, upper - 1, left + cell[0], upper + cell[1]), outline=LINE)
            sheet.paste(image, (left, upper))
    with atomic_file(path) as temporary:
        sheet.save(temporary, format="PNG")


def _font(text: str) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return a font for the text: Pillow's own for ASCII, else DejaVu Sans, which is part of matplotlib.

    DejaVu Sans has Latin, Greek, Cyrillic and more, but not Chinese or Japanese: it draws a box for a missing letter.
    """
    from PIL import ImageFont

    if text.isascii():
        return ImageFont.load_default(17)
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", 16)


def _shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Return the text on one line, with an ellipsis where it does not fit into `width` pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text.rstrip()}..."
