"""The sample clip: "a red ball is bouncing on the grass", drawn by arithmetic, and the edits to try on it.

python -m toyworld.sample data
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tav_model.errors import TavError
from tav_model.files import atomic_file

if TYPE_CHECKING:
    import numpy as np

CAPTION = "a red ball is bouncing on the grass"
# prompt, name, category; one of each category of the LOVEU-TGVE benchmark
EDITS = (
    ("a blue cube is bouncing on the grass", "blue-cube", "object"),
    ("a red ball is bouncing on the snow", "on-snow", "background"),
    ("a watercolor painting of a red ball bouncing on the grass", "watercolor", "style"),
    ("a cartoon of a yellow cube bouncing on the sand", "cartoon-cube-on-sand", "multiple"),
)
FRAMES, SIDE, FPS = 24, 256, 12
BOUNCES = 2
# Drawn this many times as large and averaged down, which smooths the edges.
OVERSAMPLING = 4

# Lengths and places are shares of the picture's side, from its upper left corner.
HORIZON = 0.62
SUN = (0.79, 0.19)
RADIUS = 0.105
# Where the ball touches the grass, and its shadow lies.
GROUND = 0.86


def draw_clip() -> np.ndarray:
    """The frames, uint8 `f h w c` of 24 x 256 x 256 x 3."""
    import numpy as np

    meadow = _meadow()
    return np.stack([_reduce(_with_ball(meadow, frame / FRAMES)) for frame in range(FRAMES)])


def write_sample(folder: Path) -> list[Path]:
    """Write ball.mp4 (H.264, 12 frames a second) and ball.csv (prompt, name, category) to ``folder``.

    Raises:
        TavError: ``folder`` cannot be written.
    """
    video, edits = folder / "ball.mp4", folder / "ball.csv"
    try:
        with atomic_file(video) as temporary:
            _write_video(temporary)
        with atomic_file(edits) as temporary:
            _write_edits(temporary)
    except OSError as error:
        raise TavError(f"{folder}: cannot be written ({error.strerror})") from error
    return [video, edits]


def _write_video(path: Path) -> None:
    import av

    # The same bytes on a busy machine: one thread, and no second one that looks ahead.
    x264 = {
        "crf": "16",
        "preset": "veryslow",
        "threads": "1",
        "x264-params": "rc-lookahead=0:sync-lookahead=0:mbtree=0",
    }
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=FPS, options=x264)
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        for picture in draw_clip():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def _write_edits(path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("prompt", "name", "category"))
        writer.writerows(EDITS)


def _grid() -> tuple[np.ndarray, np.ndarray]:
    """The centres of the large picture's points: x rightwards and y downwards, 0 to 1, each `h w`."""
    import numpy as np

    side = SIDE * OVERSAMPLING
    centres = (np.arange(side, dtype=np.float32) + 0.5) / side
    return np.meshgrid(centres, centres)


def _reduce(picture: np.ndarray) -> np.ndarray:
    """The large picture, float `h w c` in 0 to 1, averaged down to uint8."""
    import numpy as np

    k = OVERSAMPLING
    small = picture.reshape(SIDE, k, SIDE, k, 3).mean(axis=(1, 3))
    return np.rint(255 * small.clip(0, 1)).astype(np.uint8)


def _blend(below: np.ndarray, above: np.ndarray | tuple[float, ...], cover: np.ndarray) -> np.ndarray:
    """``above`` laid over ``below`` (`h w c`), as dense as ``cover`` (`h w`, 0 to 1)."""
    import numpy as np

    return below + cover[..., None] * (np.asarray(above, np.float32) - below)


def _meadow() -> np.ndarray:
    """All that stands still: sky, sun, clouds, hills and grass. Float `h w c` in 0 to 1, oversampled."""
    import numpy as np

    x, y = _grid()
    picture = _blend(
        np.full((*x.shape, 3), (0.28, 0.56, 0.90), np.float32), (0.86, 0.94, 0.99), (y / HORIZON).clip(0, 1)
    )

    from_sun = np.hypot(x - SUN[0], y - SUN[1])
    picture = _blend(picture, (1.0, 0.93, 0.70), 0.75 * np.exp(-(((from_sun - 0.07).clip(0) / 0.09) ** 1.2)))
    picture = _blend(picture, (1.0, 0.95, 0.66), from_sun < 0.07)

    for cloud_x, cloud_y, scale in ((0.22, 0.20, 1.0), (0.53, 0.11, 0.65), (0.93, 0.38, 0.6)):
        puffs = ((-0.095, 0.012, 0.042), (-0.04, -0.014, 0.055), (0.03, -0.022, 0.06), (0.09, 0.01, 0.045))
        cover = np.zeros_like(x)
        for dx, dy, radius in puffs:
            away = np.hypot(x - cloud_x - scale * dx, (y - cloud_y - scale * dy) * 1.25) / (scale * radius)
            cover = np.maximum(cover, 1 - np.clip((away - 0.8) / 0.35, 0, 1))
        # Clouds are flat below.
        cover *= 1 - np.clip((y - cloud_y - 0.022 * scale) / (0.02 * scale), 0, 1)
        picture = _blend(picture, (1.0, 1.0, 1.0), 0.92 * cover)

    hills = (
        (HORIZON - 0.125 + 0.055 * np.sin(5.1 * x + 0.4) + 0.020 * np.sin(11.7 * x + 2.0), (0.47, 0.66, 0.66)),
        (HORIZON - 0.060 + 0.045 * np.sin(6.3 * x + 3.4) + 0.012 * np.sin(15.0 * x), (0.36, 0.62, 0.42)),
    )
    for ridge, colour in hills:
        lit = np.asarray(colour, np.float32) + 0.55 * (ridge - y)[..., None]
        picture = _blend(picture, lit, y > ridge)

    near = ((y - HORIZON) / (1 - HORIZON)).clip(0, 1)
    grass = _blend(np.full_like(picture, (0.50, 0.76, 0.30)), (0.20, 0.52, 0.16), near)
    # Mown stripes, in perspective, towards a point on the horizon.
    stripes = np.sin(9 * (x - 0.5) / (0.12 + near))
    grass *= 1 + 0.05 * np.tanh(4 * stripes)[..., None]
    picture = _blend(picture, grass, y > HORIZON)
    return _with_blades(picture)


def _with_blades(picture: np.ndarray) -> np.ndarray:
    """Tufts of grass and some flowers, small at the horizon and large below."""
    import numpy as np
    from PIL import Image, ImageDraw

    rng = np.random.default_rng(7)
    canvas = Image.fromarray(np.rint(255 * picture.clip(0, 1)).astype(np.uint8))
    draw = ImageDraw.Draw(canvas)
    side = canvas.width
    for depth in np.sort(rng.random(700) ** 0.8):
        x, y = rng.random() * side, (HORIZON + 0.015 + (1.02 - HORIZON) * depth) * side
        height = (0.008 + 0.030 * depth) * side
        shade = rng.uniform(0.72, 1.2)
        colour = tuple(int(255 * shade * c) for c in (0.42 - 0.20 * depth, 0.70 - 0.20 * depth, 0.25 - 0.1 * depth))
        for lean in (-0.45, 0.05, 0.5):
            tip = (x + (lean + rng.uniform(-0.15, 0.15)) * height, y - height * (1 - 0.4 * abs(lean)))
            draw.polygon([(x - 0.09 * height, y), (x + 0.09 * height, y), tip], fill=colour)
    for depth in np.sort(rng.random(26)):
        x, y = rng.random() * side, (HORIZON + 0.03 + (0.98 - HORIZON) * depth) * side
        radius = (0.003 + 0.006 * depth) * side
        petals = ((255, 250, 240), (255, 226, 96), (240, 190, 230))[rng.integers(3)]
        for turn in np.arange(5) * 2 * np.pi / 5:
            centre = (x + radius * np.cos(turn), y + 0.8 * radius * np.sin(turn))
            draw.circle(centre, 0.7 * radius, fill=petals)
        draw.circle((x, y), 0.55 * radius, fill=(250, 180, 40))
    return np.asarray(canvas, np.float32) / 255


def _with_ball(picture: np.ndarray, time: float) -> np.ndarray:
    """The ball and its shadow at ``time``, from 0 to 1: it starts on the ground at the left and ends at the right."""
    import numpy as np

    x, y = _grid()
    phase = time * BOUNCES % 1
    height = 4 * phase * (1 - phase)
    centre_x = 0.16 + 0.68 * time
    # Flat where it touches the ground, stretched where it is fast, of the same volume throughout.
    stretch = 1 - 0.14 * math.exp(-height / 0.06) + 0.07 * abs(2 * phase - 1) * (1 - math.exp(-height / 0.10))
    radius_x, radius_y = RADIUS / stretch**0.5, RADIUS * stretch
    centre_y = GROUND - radius_y - 0.44 * height

    wide = RADIUS * (1.05 + 0.25 * height)
    away = np.hypot((x - centre_x + 0.05 * height) / wide, (y - GROUND) / (0.28 * wide))
    softness = 0.25 + 0.5 * height
    shadow = 1 - np.clip((away - 1 + softness / 2) / softness, 0, 1)
    picture = _blend(picture, (0.05, 0.16, 0.06), (0.62 - 0.34 * height) * shadow)

    # A sphere's normal at each point, and light from the sun's side.
    normal_x, normal_y = (x - centre_x) / radius_x, (y - centre_y) / radius_y
    inside = normal_x**2 + normal_y**2 < 1
    normal_z = np.sqrt((1 - normal_x**2 - normal_y**2).clip(0))
    light = np.array((0.50, -0.62, 0.60), np.float32)
    light /= np.linalg.norm(light)
    lit = (normal_x * light[0] + normal_y * light[1] + normal_z * light[2]).clip(0, 1)
    ball = np.multiply.outer(0.34 + 0.72 * lit, np.array((0.90, 0.10, 0.09), np.float32))
    # The grass shines up from below.
    ball += np.multiply.outer(0.16 * (normal_y.clip(0) ** 2) * (1 - lit), np.array((0.35, 0.9, 0.25), np.float32))
    halfway = light + np.array((0.0, 0.0, 1.0), np.float32)
    halfway /= np.linalg.norm(halfway)
    shine = (normal_x * halfway[0] + normal_y * halfway[1] + normal_z * halfway[2]).clip(0, 1) ** 60
    return _blend(picture, _blend(ball, (1.0, 1.0, 1.0), 0.75 * shine), inside)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m toyworld.sample", description=f'Draw the clip "{CAPTION}".')
    parser.add_argument("folder", type=Path, help="where to write ball.mp4 and ball.csv, for example data")
    try:
        for path in write_sample(parser.parse_args(arguments).folder):
            print(path)
    except TavError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
