"""Add a clip to a project: its video, its prompt CSV and its entry in params.yaml; all of them or nothing."""

from __future__ import annotations

import contextlib
import fcntl
import re
import shutil
import stat
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tav.config import CLIP_NAME, CLIP_NAME_RULE, DecodeParams, Params, add_clip, load_params
from tav.config.paths import project_path
from tav.config.prompts import csv_text, make_rows, read_prompts
from tav.media.decoding import IMAGES, read_frames
from tav_model.digests import digest
from tav_model.errors import TavError
from tav_model.files import atomic_file, atomic_folder, write_text

LONGEST_NAME = 64
# What runs leave, and what belongs to git, DVC and tav: a video in there is copied like one from elsewhere.
NO_PLACE = ("results", "logs", "mlartifacts", "mlruns")


@dataclass(frozen=True)
class Added:
    """A clip that is in the project now; paths are relative to it.

    Attributes:
        frames: how many of its frames the pipeline will use.
        height, width: the size it will use them at.
        edits: the names of its prompts.
    """

    name: str
    video: str
    caption: str
    prompts: str
    frames: int
    height: int
    width: int
    edits: list[str]


def add(
    root: Path,
    video: Path,
    caption: str,
    name: str | None = None,
    edits: Sequence[str] = (),
    decode: Mapping[str, Any] | None = None,
) -> Added:
    """Register a clip. Its frames are read as the stage `decode` will read them, in a process of their own, first.

    A video inside the project is referred to; any other is copied to `data/NAME`. Without `edits`, an existing
    `data/NAME.csv` is taken, else the caption becomes the only prompt: how well the clip itself is reproduced.

    Args:
        video: a video, an animated GIF or a folder of numbered images, anywhere.
        name: default: made from the video's name.
        edits: prompts.
        decode: what the clip wants otherwise than the section `decode`.

    Raises:
        TavError: a name that is taken or not allowed, an unreadable video, a prompt or parameter that is not allowed, or
            another file where one should go. The project is as it was.
    """
    path = root / "params.yaml"
    load_params(path)
    video = video.expanduser()
    name = _slug(video) if name is None else name
    if not re.fullmatch(CLIP_NAME, name):
        raise TavError(f"--name: {name!r} is not allowed: {CLIP_NAME_RULE}")
    _check_kind(video)
    if not caption.strip():
        raise TavError("--caption: must be a text that is not blank")
    make_rows([caption], "--caption")
    prompts = [row.prompt for row in make_rows(edits, "--edit")]
    with _alone(root):
        inside = _inside(root, video)
        target, table = root / (inside or f"data/{name}{_suffix(video)}"), root / f"data/{name}.csv"
        entry: dict[str, Any] = {
            "video": target.relative_to(root).as_posix(),
            "caption": caption.strip(),
            "prompts": table.relative_to(root).as_posix(),
            "decode": dict(decode or {}),
        }
        _, params = add_clip(path, name, entry)
        decode_params = params.decode_for(name)
        new = [place for place in (target, table) if not place.exists()]
        try:
            with contextlib.ExitStack() as files:
                if inside:
                    _probe(video, video, decode_params)
                else:
                    _copy(files, video, target, decode_params)
                if prompts or table in new:
                    _write_table(files, table, prompts or [entry["caption"]])
            names = [row.name for row in read_prompts(table)]
            # Read again: to copy and to read a video takes a while, in which the user may have changed the file.
            text, params = add_clip(path, name, entry)
            write_text(path.resolve(), text)
        except BaseException:
            for place in new:
                _remove(place)
            raise
    return _added(params, name, names)


def _added(params: Params, name: str, edits: list[str]) -> Added:
    clip, decode = params.clip(name), params.decode_for(name)
    size = {"frames": decode.frames, "height": decode.height, "width": decode.width}
    return Added(name, clip.video, clip.caption, clip.prompts, **size, edits=edits)


def _check_kind(video: Path) -> None:
    """Whether the path is one that can be read to its end: a device or a pipe may have none.

    Raises:
        TavError: it is not there, or neither a file nor a folder.
    """
    try:
        mode = video.stat().st_mode
    except FileNotFoundError:
        raise TavError(f"{video}: no such file") from None
    except (OSError, ValueError) as error:
        raise TavError(f"{str(video)!r}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise TavError(f"{video}: neither a video file nor a folder of images")


def _inside(root: Path, video: Path) -> str | None:
    """How params.yaml calls a video that lies in the project already; None for one that is to be copied there."""
    real, top = video.resolve(), root.resolve()
    if not real.is_relative_to(top) or real == top:
        return None
    relative = real.relative_to(top)
    if relative.parts[0] in NO_PLACE or relative.parts[0].startswith("."):
        return None
    try:
        project_path(root, relative.as_posix(), "")
    except TavError:
        return None  # A name that params.yaml does not allow; the copy gets a better one.
    return relative.as_posix()


def _slug(video: Path) -> str:
    """The video's name as a clip's name."""
    name = video.resolve().name if video.is_dir() else video.stem
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9_]+", "-", plain)[:LONGEST_NAME].strip("-_")
    if not slug:
        raise TavError(f"{video}: no clip's name can be made from this; give one (--name)")
    return slug


def _suffix(video: Path) -> str:
    if video.is_dir():
        return ""
    suffix = video.suffix.lower()
    # Such a copy would lie where the prompts go.
    return suffix if re.fullmatch(r"\.[a-z0-9]{1,8}", suffix) and suffix != ".csv" else ".video"


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """One process at a time changes the list of clips; the lock goes with the process."""
    path = root / ".tav" / "clips.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _copy(files: contextlib.ExitStack, video: Path, target: Path, decode_params: DecodeParams) -> None:
    """The video at its place, when `files` is left; what is probed is the copy, which nobody changes any more."""
    if target.exists():
        if digest(target) != digest(video):
            raise TavError(f"{target}: is another file already; give another name (--name), or take it away")
        _probe(target, video, decode_params)
    elif video.is_dir():
        folder = files.enter_context(atomic_folder(target))
        for image in sorted(video.iterdir()):
            if image.suffix.lower() in IMAGES and image.is_file() and not image.name.startswith("."):
                shutil.copyfile(image, folder / image.name)
        _probe(folder, video, decode_params)
    else:
        temporary = files.enter_context(atomic_file(target))
        shutil.copyfile(video, temporary)
        _probe(temporary, video, decode_params)


def _probe(path: Path, video: Path, decode_params: DecodeParams) -> None:
    try:
        read_frames(path, decode_params)
    except TavError as error:
        message = str(error).replace(str(path), str(video))
        raise TavError(message + (" (--frames)" if message.endswith("ask for fewer") else "")) from None


def _write_table(files: contextlib.ExitStack, target: Path, prompts: Sequence[str]) -> None:
    """The CSV at its place, when `files` is left."""
    text = csv_text([["prompt"], *([prompt] for prompt in prompts)])
    if target.exists():
        if target.read_bytes() != text.encode():
            raise TavError(f"{target}: holds other prompts already; add yours there, or give another name (--name)")
        return
    temporary = files.enter_context(atomic_file(target))
    temporary.write_text(text, encoding="utf-8", newline="")


def _remove(place: Path) -> None:
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place, ignore_errors=True)
    else:
        place.unlink(missing_ok=True)
