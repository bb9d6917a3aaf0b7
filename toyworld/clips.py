"""Write the sample clips: videos, prompt CSVs, and the scene files from which the ground truth of edits is rendered.

Usage: `python -m toyworld.clips data`
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tav_model.errors import TavError
from tav_model.files import atomic_file
from toyworld.captions import caption
from toyworld.scenes import Scene, Truth, save_truth

if TYPE_CHECKING:
    import numpy as np

FRAMES, FPS = 24, 12


def _clip(scene: Scene, edits: dict[str, dict[str, str]]) -> Truth:
    return Truth(scene, FRAMES, {name: scene.edited(**changes) for name, changes in edits.items()})


# The sample clips, each with an edit of every category.
CLIPS: dict[str, Truth] = {
    "ball": _clip(
        Scene(
            "ball", "red", "grass", "day", "plain", "bouncing", 0.17, 0.2, 0.8, 0.1, "stripes", "white", 0.25, 0.75, 0.2
        ),
        {
            "blue-ball": {"colour": "blue"},
            "cube": {"object": "cube"},
            "on-sand": {"ground": "sand"},
            "cartoon": {"style": "cartoon"},
            "yellow-star-at-night": {"object": "star", "colour": "yellow", "sky": "night"},
        },
    ),
    "cube": _clip(
        Scene("cube", "green", "snow", "day", "plain", "rolling", 0.17, 0.2, 0.8, 0.62, "dots", "deep", 0.2, 0.1, 0.25),
        {
            "purple-cube": {"colour": "purple"},
            "ball": {"object": "ball"},
            "at-sunset": {"sky": "sunset"},
            "pixel-art": {"style": "pixel art"},
            "red-ball-on-the-road": {"object": "ball", "colour": "red", "ground": "road"},
        },
    ),
    "fish": _clip(
        Scene(
            "fish",
            "orange",
            "sea",
            "day",
            "plain",
            "swinging",
            0.19,
            0.24,
            0.76,
            0.35,
            "stripes",
            "white",
            0.15,
            0.0,
            -0.2,
        ),
        {
            "pink-fish": {"colour": "pink"},
            "boat": {"object": "boat"},
            "at-night": {"sky": "night"},
            "cartoon": {"style": "cartoon"},
            "blue-fish-over-snow": {"colour": "blue", "ground": "snow", "style": "cartoon"},
        },
    ),
    "rocket": _clip(
        Scene(
            "rocket",
            "blue",
            "sand",
            "night",
            "plain",
            "rising",
            0.19,
            0.4,
            0.6,
            0.8,
            "checks",
            "white",
            0.3,
            0.25,
            0.15,
        ),
        {
            "red-rocket": {"colour": "red"},
            "star": {"object": "star"},
            "by-day-on-grass": {"sky": "day", "ground": "grass"},
            "pixel-art": {"style": "pixel art"},
            "yellow-tree-at-sunset": {"object": "tree", "colour": "yellow", "sky": "sunset"},
        },
    ),
}


def write_clip(folder: Path, name: str) -> list[Path]:
    """Write NAME.mp4 (H.264, 12 frames per second), NAME.csv (prompt, name, category) and scenes/NAME.json.

    Returns:
        The three files.

    Raises:
        TavError: the folder cannot be written.
    """
    return write_rendered(folder, name, CLIPS[name])


def write_rendered(folder: Path, name: str, truth: Truth) -> list[Path]:
    """Write the files of `write_clip` for any rendered clip.

    Returns:
        The video, the CSV and the scene file.

    Raises:
        TavError: the folder cannot be written.
    """
    from toyworld.renderer import render_clip

    video, prompts, scenes = folder / f"{name}.mp4", folder / f"{name}.csv", folder / "scenes" / f"{name}.json"
    try:
        with atomic_file(video) as temporary:
            _write_video(temporary, render_clip(truth.scene, truth.frames))
        with atomic_file(prompts) as temporary:
            _write_prompts(temporary, truth)
        save_truth(scenes, truth.scene, truth.frames, {edit: truth.changes(edit) for edit in truth.edits})
    except OSError as error:
        raise TavError(f"{folder}: cannot be written ({error.strerror})") from error
    return [video, prompts, scenes]


def _write_video(path: Path, frames: np.ndarray) -> None:
    import av

    # One thread and no lookahead: otherwise the file depends on the machine's load.
    x264 = {
        "crf": "12",
        "preset": "veryslow",
        "threads": "1",
        "x264-params": "rc-lookahead=0:sync-lookahead=0:mbtree=0",
    }
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=FPS, options=x264)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def _write_prompts(path: Path, truth: Truth) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("prompt", "name", "category"))
        writer.writerows((caption(edited), edit, truth.category(edit)) for edit, edited in truth.edits.items())


def main(arguments: list[str] | None = None) -> int:
    """Write all sample clips to the folder that the command line names, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m toyworld.clips", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="folder to write the clips to, such as data")
    folder = parser.parse_args(arguments).folder
    try:
        for name in CLIPS:
            print(*write_clip(folder, name))
    except TavError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
