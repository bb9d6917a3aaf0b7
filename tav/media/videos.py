"""Videos, previews and contact sheets: what people look at."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from tav_model.errors import TavError
from tav_model.files import atomic_file

if TYPE_CHECKING:
    import numpy as np
    from PIL import ImageFont

# One thread, and no looking ahead: what libx264's lookahead thread sees depends on the machine's load, and so would the file.
X264 = {"crf": "17", "preset": "medium", "threads": "1", "x264-params": "rc-lookahead=0:sync-lookahead=0:mbtree=0"}
BT709 = 1  # The code of this standard for primaries, transfer and matrix alike.
PREVIEW_SIDE = 320
CELL, GAP, MARGIN = 168, 6, 24
INK, PAPER, LINE = (32, 33, 36), (255, 255, 255), (226, 228, 232)


def write_mp4(path: Path, frames: np.ndarray, fps: Fraction) -> None:
    """Write `f h w 3` uint8 frames as H.264 in yuv420p, which plays everywhere; the same frames give the same bytes.

    yuv420p has one colour sample for two pixels, so an odd side gets its last row or column twice.
    """
    import av
    import numpy as np

    _, height, width, _ = frames.shape
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with atomic_file(path) as temporary, av.open(str(temporary), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=fps, options=X264)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = 1  # Video levels.
        for pixels in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            container.mux(stream.encode(picture.reformat(format="yuv420p", dst_colorspace="ITU709")))
        container.mux(stream.encode(None))


def read_mp4(path: Path) -> tuple[np.ndarray, Fraction]:
    """The frames of one of our own videos, `f h w 3` in uint8, and its rate.

    Raises:
        TavError: missing or damaged.
    """
    import av
    import numpy as np

    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
            if stream.average_rate is None:
                raise ValueError("no frame rate")
            return np.stack(frames), Fraction(stream.average_rate)
    except FileNotFoundError:
        raise TavError(f"{path}: no such file") from None
    except (av.error.FFmpegError, IndexError, ValueError) as error:
        raise TavError(f"{path}: not a video of this project ({error})") from None


def write_preview(path: Path, frames: np.ndarray, fps: Fraction) -> None:
    """Write a small animated WebP that plays for ever."""
    from PIL import Image

    images = [Image.fromarray(pixels) for pixels in frames]
    for image in images:
        image.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE), Image.Resampling.LANCZOS)
    milliseconds = max(1, round(1000 / fps))
    with atomic_file(path) as temporary:
        images[0].save(
            temporary, format="WEBP", save_all=True, append_images=images[1:], duration=milliseconds, loop=0, quality=80
        )


def contact_sheet(path: Path, rows: Sequence[tuple[str, np.ndarray]], columns: int = 8) -> None:
    """Write a PNG with a row of evenly chosen frames for each video, and its label above it.

    Args:
        rows: labels with `f h w 3` uint8 frames, the source first.
    """
    from PIL import Image, ImageDraw

    font = _font("".join(text for text, _ in rows))
    columns = min(columns, max(len(frames) for _, frames in rows))
    height, width = rows[0][1].shape[1:3]
    scale = CELL / max(height, width)
    cell = (max(1, round(width * scale)), max(1, round(height * scale)))
    label = 34
    row_height = label + cell[1] + 2 * GAP
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
            left, upper = MARGIN + column * (cell[0] + GAP), top + label
            # The outline shows where a white frame ends on white paper.
            draw.rectangle((left - 1, upper - 1, left + cell[0], upper + cell[1]), outline=LINE)
            sheet.paste(image, (left, upper))
    with atomic_file(path) as temporary:
        sheet.save(temporary, format="PNG")


def _font(text: str) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font knows ASCII; for anything more there is the one that comes with matplotlib.

    That one has Latin, Greek, Cyrillic and more, but no Chinese or Japanese: a box stands for a letter it lacks.
    """
    from PIL import ImageFont

    if text.isascii():
        return ImageFont.load_default(17)
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", 16)


def _shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The text on one line, with an ellipsis where it does not fit."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text.rstrip()}..."
