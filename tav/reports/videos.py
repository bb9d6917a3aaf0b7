"""The videos of a report: source, edits and their rendered truths, each embedded in the page as a data: URI, or linked."""

from __future__ import annotations

import difflib
import io
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from tav.config import Params
from tav.config.paths import Project
from tav.config.prompts import read_prompts
from tav.config.results import mask_image
from tav.media.scene_truth import load_clip_truth
from tav.reports.figures import data_uri
from tav_model.errors import TavError
from tav_model.files import read_json
from tav_model.video import sample_video, write_video

if TYPE_CHECKING:
    import numpy as np

POSTER_SIDE = 320
LARGEST_EMBEDDED = 15 * 2**20  # bytes of all videos of a page; in a page, each byte takes four thirds
MOSAIC_SIDE, MOSAIC_GAP = 240, 4
# An edit's settings, in the order of the page.
SETTINGS = ("seed", "steps", "guidance_scale", "negative_prompt", "preset", "mask", "control")


@dataclass(frozen=True)
class Video:
    """A video as it is embedded in the page.

    Attributes:
        data: the MP4 file as a data: URI, or its path relative to the page.
        poster: the first frame as a data: URI.
    """

    data: str
    poster: str
    frames: int
    width: int
    height: int
    fps: Fraction


@dataclass(frozen=True)
class RenderedEdit:
    """An edit that has been rendered.

    Attributes:
        words: the prompt in runs of words, and whether each differs from the caption.
        truth: what the edit should look like, if that is known.
        identity: digest of everything that decides the video; empty where the record has none.
        mask: a picture of where it was edited, as a data: URI; empty without a mask.
    """

    name: str
    prompt: str
    category: str
    settings: dict[str, Any]
    words: list[tuple[str, bool]]
    video: Video
    truth: Video | None
    identity: str
    mask: str = ""


def edit_paths(folder: Path) -> list[Path]:
    """Return the videos of the edits in a folder, ordered by name."""
    return sorted(path for path in folder.glob("*.mp4") if not path.name.startswith("."))


def page_of_links(paths: Iterable[Path], page: Path) -> Path | None:
    """Return the page whose videos are linked, rather than embedded; None if they are small enough together.

    Args:
        paths: the videos of the page.
        page: the page's path.
    """
    return page if sum(path.stat().st_size for path in paths if path.exists()) > LARGEST_EMBEDDED else None


def embed_video(path: Path, page: Path | None = None) -> Video | None:
    """Read one of the project's videos; None if there is no such file. With `page`, it is linked from there."""
    return _embedded(path, page) if path.exists() else None


def read_conditions(folder: Path, source: Video | None, page: Path | None = None) -> list[tuple[str, Video]]:
    """Return what control networks see of a clip: the kind of each condition, and its video.

    Args:
        folder: the output of the stage `annotate`.
        source: the clip; conditions with another number of frames, which cannot play beside it, are left out.
        page: links the videos from there.
    """
    numbered = {path: path.stem.partition("-") for path in folder.glob("*-*.mp4")}
    paths = sorted((path for path, parts in numbered.items() if parts[0].isdigit()), key=lambda p: int(numbered[p][0]))
    videos = [(numbered[path][2], _embedded(path, page)) for path in paths]
    return [(kind, video) for kind, video in videos if source is not None and video.frames == source.frames]


def _embedded(path: Path, page: Path | None = None) -> Video:
    (first,), frames, fps = sample_video(path, lambda _: [0])
    height, width, _ = first.shape
    linked = None if page is None else quote(path.relative_to(page.parent).as_posix())
    data = linked or data_uri("video/mp4", path.read_bytes())
    return Video(data, _webp(first, POSTER_SIDE), frames, width, height, fps)


def read_edits(
    root: Path, clip: str, params: Params, fps: Fraction | None, page: Path | None = None
) -> list[RenderedEdit]:
    """Read the edits of a clip, in the order of its CSV; those that are not in it any more are the last, ordered by name.

    Args:
        root: the project's folder.
        clip: the clip's name.
        params: the project's parameters.
        fps: the source's frame rate, at which the truths play; None leaves them out.
        page: links the videos from there, and leaves out the truths.

    Raises:
        TavError: An edit has no JSON file or no prompt, or a video is damaged.
    """
    truths = _render_truths(root, clip, params, fps) if fps and page is None else {}
    caption = params.clip(clip).caption
    paths = ordered_edit_paths(root, clip, params)
    return [read_edit(path, path.stem, caption, truths.get(path.stem), page) for path in paths]


def ordered_edit_paths(root: Path, clip: str, params: Params) -> list[Path]:
    """Return the videos of a clip's edits, in the order of its CSV; those that are not in it any more are the last."""
    places = {name: place for place, name in enumerate(csv_names(root, params, clip))}
    return sorted(edit_paths(Project(root).edits(clip)), key=lambda path: places.get(path.stem, len(places)))


def csv_names(root: Path, params: Params, clip: str) -> list[str]:
    """Return the names of the rows of a clip's CSV, in its order; none where it, or the clip, is missing or invalid."""
    try:
        return [row.name for row in read_prompts(root / params.clip(clip).prompts)]
    except TavError:
        return []


def read_edit(
    path: Path, name: str, caption: str, truth: Video | None = None, page: Path | None = None
) -> RenderedEdit:
    """Read one edit.

    Args:
        path: its video, with its JSON file beside it.
        name: its name on the page.
        caption: the clip's.
        truth: what it should look like, if that is known.
        page: links the video from there.

    Raises:
        TavError: it has no JSON file or no prompt, or its video is damaged.
    """
    record = read_json(path.with_suffix(".json"))
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise TavError(f"{path.with_suffix('.json')}: no prompt; it must be an object with the text 'prompt'")
    video = _embedded(path, page)
    return RenderedEdit(
        name=name,
        prompt=record["prompt"],
        category=record.get("category") or "",
        settings={name: record[name] for name in SETTINGS if record.get(name) is not None},
        words=changed_words(caption, record["prompt"]),
        video=video,
        # If the number of frames has changed since, the truth cannot play beside the edit.
        truth=truth if truth and truth.frames == video.frames else None,
        identity=str(record.get("identity", "")),
        mask=mask_image(record),
    )


def _render_truths(root: Path, clip: str, params: Params, fps: Fraction) -> dict[str, Video]:
    import numpy as np

    from toyworld.renderer import render

    truth, indexes = load_clip_truth(root, clip, params)
    if truth is None:
        return {}
    videos = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, scene in truth.edits.items():
            path = Path(folder) / "truth.mp4"
            write_video(path, np.stack([render(scene, time) for time in truth.times(indexes)]), fps)
            videos[name] = _embedded(path)
    return videos


def changed_words(caption: str, prompt: str) -> list[tuple[str, bool]]:
    """Return the prompt in runs of words, and whether each run differs from the caption."""
    before, after = caption.lower().split(), prompt.split()
    matcher = difflib.SequenceMatcher(None, before, [word.lower() for word in after], autojunk=False)
    return [
        (" ".join(after[start:end]), tag != "equal") for tag, _, _, start, end in matcher.get_opcodes() if start < end
    ]


def mosaic(source: Path, edits: Sequence[Path]) -> str | None:
    """Return a small image of a frame of the source beside the same frame of up to four edits; None without a source."""
    import numpy as np
    from PIL import Image, ImageOps

    if not source.exists():
        return None

    def tile(path: Path, width: int, height: int) -> Image.Image:
        (frame,), _, _ = sample_video(path, lambda available: [available // 3])
        return ImageOps.fit(Image.fromarray(frame), (width, height), Image.Resampling.LANCZOS)

    # The image always has the same size, so that cards are equally high: fewer edits get larger tiles.
    side, half = MOSAIC_SIDE, MOSAIC_SIDE // 2
    layout = {
        0: [],
        1: [(0, 0, side, side)],
        2: [(0, 0, side, half), (0, half, side, half)],
        3: [(0, 0, side, half), (0, half, half, half), (half, half, half, half)],
        4: [(0, 0, half, half), (half, 0, half, half), (0, half, half, half), (half, half, half, half)],
    }[min(len(edits), 4)]
    canvas = Image.new("RGBA", (2 * side, side))  # The gaps are transparent.
    canvas.paste(tile(source, side - MOSAIC_GAP if layout else 2 * side, side), (0, 0))
    for path, (left, top, width, height) in zip(edits, layout, strict=False):
        width, height = width - MOSAIC_GAP * (left + width < side), height - MOSAIC_GAP * (top + height < side)
        canvas.paste(tile(path, width, height), (side + left, top))
    return _webp(np.asarray(canvas), 2 * side)


def _webp(pixels: np.ndarray, side: int) -> str:
    from PIL import Image

    image = Image.fromarray(pixels)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, format="WEBP", quality=82)
    return data_uri("image/webp", stream.getvalue())
