"""Register a user's video as a clip: its video, its prompt CSV and its entry in params.yaml; all of them or nothing."""

from __future__ import annotations

import contextlib
import re
import shutil
import stat
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tav.config import CLIP_NAME, CLIP_NAME_RULE, DecodeParams, add_clip, load_params, no_own_settings
from tav.config.control import check_control
from tav.config.paths import MASKS, project_path
from tav.config.prompts import csv_text, make_rows, read_prompts
from tav.media.decoding import decoded_frames
from tav.media.frame_readers import IMAGE_SUFFIXES
from tav.media.masks import check_mask_file, load_mask
from tav.runtime.locks import waiting_lock
from tav_model.digests import digest
from tav_model.errors import TavError
from tav_model.files import atomic_file, atomic_folder, write_text

LONGEST_CLIP_NAME = 64
# Folders with outputs of runs. A video in one of them, or in a hidden folder, is copied like a video from elsewhere.
OUTPUT_FOLDERS = ("results", "logs", "mlartifacts", "mlruns")


@dataclass(frozen=True)
class ImportedClip:
    """A clip that was added to the project.

    Attributes:
        name: its name in params.yaml.
        video: path of the video, relative to the project.
        caption: its caption.
        prompts: path of the prompt CSV, relative to the project.
        frames: number of frames that the pipeline uses.
        height: height of these frames in pixels.
        width: width of these frames in pixels.
        edits: names of its edits.
    """

    name: str
    video: str
    caption: str
    prompts: str
    frames: int
    height: int
    width: int
    edits: list[str]


def import_clip(
    root: Path,
    video: Path,
    caption: str,
    name: str | None = None,
    edits: Sequence[str] = (),
    decode: Mapping[str, Any] | None = None,
    mask: Path | None = None,
    control: Sequence[Mapping[str, Any]] | None = None,
) -> ImportedClip:
    """Register a video as a clip, after a test that the stage `decode` can read it.

    A video inside the project is used where it is; any other is copied to `data/NAME`. Without `edits`, an existing
    `data/NAME.csv` is used; if there is none, the caption becomes the only prompt, which shows how well the clip itself
    is reconstructed.

    Args:
        root: folder of the project.
        video: a video, an animated GIF or a folder of numbered images, anywhere.
        caption: description of the video.
        name: name of the clip; None: made from the video's name.
        edits: prompts.
        decode: settings that replace those of the section `decode` for this clip.
        mask: where the video is edited, for every prompt: see `tav.media.masks.load_mask`. It is copied as the video is, to
            `data/masks/NAME`.
        control: the clip's own control networks, as `ControlParams`; None: the common ones.

    Raises:
        TavError: a name that exists or is not allowed, an unreadable video, a prompt or parameter that is not allowed, or
            another file at the place of a new one. The project is unchanged.
    """
    path = root / "params.yaml"
    load_params(path)
    video = video.expanduser()
    name = _name_from(video) if name is None else name
    if not re.fullmatch(CLIP_NAME, name):
        raise TavError(f"--name: {name!r} is not allowed: {CLIP_NAME_RULE}")
    _check_file_type(video)
    if mask is not None:
        mask = mask.expanduser()
        _check_file_type(mask)
        check_mask_file(mask, f"--mask: {mask}")
    if not caption.strip():
        raise TavError("--caption: must be a string that is not blank")
    make_rows([caption], "--caption")
    prompts = [row.prompt for row in make_rows(edits, "--edit")]
    if len(prompts) < len(edits):
        repeated, _ = Counter(edit.strip() for edit in edits).most_common(1)[0]
        raise TavError(f"--edit: {repeated!r} is given more than once; give each prompt once")
    with waiting_lock(root / ".tav" / "clips.lock"):
        inside = _path_inside(root, video)
        target, table = root / (inside or f"data/{name}{_suffix(video)}"), root / f"data/{name}.csv"
        entry: dict[str, Any] = {
            "video": target.relative_to(root).as_posix(),
            "caption": caption.strip(),
            "prompts": table.relative_to(root).as_posix(),
            **no_own_settings(),
            "decode": dict(decode or {}),
        }
        if control is not None:
            entry["control"] = [dict(one) for one in control]
        _, params = add_clip(path, name, entry)
        check_control(root, name, params)
        decode_params = params.for_clip(name).decode
        mask_target, mask_path = _mask_place(root, mask, name)
        created = [place for place in (target, table, mask_target) if place is not None and not place.exists()]
        try:
            with contextlib.ExitStack() as files:
                num_frames = (
                    _probe(video, video, decode_params) if inside else _copy(files, video, target, decode_params)
                )
                if mask is not None:
                    load_mask(mask, decode_params.model_copy(update={"frames": num_frames}))
                    if mask_target is not None:
                        _copy_mask(files, mask, mask_target)
                if prompts or table in created:
                    _write_table(files, table, prompts or [entry["caption"]], mask_path)
                elif mask is not None:
                    raise TavError(f"--mask: {table} is there already; put {mask_path} into its column mask")
            names = [row.name for row in read_prompts(table)]
            # Read the file again: the user may have changed it while the video was copied and read.
            text, params = add_clip(path, name, entry)
            write_text(path.resolve(), text)
        except BaseException:
            for place in created:
                _remove(place)
            raise
    clip, decode_params = params.clip(name), params.for_clip(name).decode
    return ImportedClip(
        name=name,
        video=clip.video,
        caption=clip.caption,
        prompts=clip.prompts,
        frames=num_frames,
        height=decode_params.height,
        width=decode_params.width,
        edits=names,
    )


def _check_file_type(video: Path) -> None:
    """Refuse what is not a regular file or a folder: reading a device or a pipe may never end.

    Raises:
        TavError: missing, unreadable, or neither a file nor a folder.
    """
    try:
        mode = video.stat().st_mode
    except FileNotFoundError:
        raise TavError(f"{video}: no such file") from None
    except (OSError, ValueError) as error:
        raise TavError(f"{str(video)!r}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise TavError(f"{video}: neither a video file nor a folder of images")


def _path_inside(root: Path, video: Path) -> str | None:
    """Return the path, relative to the project, of a video that is used where it is; None if it has to be copied."""
    real, top = video.resolve(), root.resolve()
    if not real.is_relative_to(top) or real == top:
        return None
    relative = real.relative_to(top)
    if relative.parts[0] in OUTPUT_FOLDERS or relative.parts[0].startswith("."):
        return None
    try:
        project_path(root, relative.as_posix(), "")
    except TavError:
        return None  # params.yaml does not allow this name; the copy gets a name that it allows.
    return relative.as_posix()


def _name_from(video: Path) -> str:
    """Return a clip name made from the name of a video."""
    name = video.resolve().name if video.is_dir() else video.stem
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9_]+", "-", plain)[:LONGEST_CLIP_NAME].strip("-_")
    if not slug:
        raise TavError(f"{video}: cannot make a clip name from this; choose one (--name)")
    return slug


def _suffix(video: Path) -> str:
    if video.is_dir():
        return ""
    suffix = video.suffix.lower()
    # A copy with the suffix .csv would take the place of the prompts.
    return suffix if re.fullmatch(r"\.[a-z0-9]{1,8}", suffix) and suffix != ".csv" else ".video"


def _copy(files: contextlib.ExitStack, video: Path, target: Path, decode_params: DecodeParams) -> int:
    """Copy the video to `target`, where it appears when `files` closes; the copy is tested, which no one else changes.

    Returns the number of frames that are used.
    """
    if _is_there(target, video):
        return _probe(target, video, decode_params)
    if video.is_dir():
        folder = files.enter_context(atomic_folder(target))
        for image in sorted(video.iterdir()):
            if image.suffix.lower() in IMAGE_SUFFIXES and image.is_file() and not image.name.startswith("."):
                shutil.copyfile(image, folder / image.name)
        return _probe(folder, video, decode_params)
    temporary = files.enter_context(atomic_file(target))
    shutil.copyfile(video, temporary)
    return _probe(temporary, video, decode_params)


def _mask_place(root: Path, mask: Path | None, name: str) -> tuple[Path | None, str | None]:
    """Return where a mask is copied to, None if it is used where it is; and its path relative to the project."""
    if mask is None:
        return None, None
    inside = _path_inside(root, mask)
    if inside is not None:
        return None, inside
    target = root / f"{MASKS}/{name}{_suffix(mask)}"
    return target, target.relative_to(root).as_posix()


def _copy_mask(files: contextlib.ExitStack, mask: Path, target: Path) -> None:
    """Copy a mask to `target`, where it appears when `files` closes."""
    if _is_there(target, mask):
        return
    if mask.is_dir():
        shutil.copytree(mask, files.enter_context(atomic_folder(target)), dirs_exist_ok=True)
    else:
        shutil.copyfile(mask, files.enter_context(atomic_file(target)))


def _is_there(target: Path, original: Path) -> bool:
    """Return whether `target` is a copy of a file or folder already; raises TavError where it is something else."""
    if not target.exists():
        return False
    if digest(target) != digest(original):
        raise TavError(f"{target}: another file exists there; choose another name (--name), or remove it")
    return True


def _probe(path: Path, video: Path, decode_params: DecodeParams) -> int:
    """Test that the file at `path` can be decoded, and return how many frames are used.

    Messages name `video`, the user's own file.
    """
    try:
        with decoded_frames(path, decode_params) as frames:
            return len(frames)
    except TavError as error:
        message = str(error).replace(str(path), str(video))
        options = {"ask for fewer": " (--frames)", "start earlier": " (--start)"}
        raise TavError(message + next((text for end, text in options.items() if message.endswith(end)), "")) from None


def _write_table(files: contextlib.ExitStack, target: Path, prompts: Sequence[str], mask: str | None = None) -> None:
    """Write the prompt CSV to `target`, where it appears when `files` closes."""
    columns = ["prompt"] if mask is None else ["prompt", "mask"]
    text = csv_text([columns, *([prompt] if mask is None else [prompt, mask] for prompt in prompts)])
    if target.exists():
        if target.read_bytes() != text.encode():
            raise TavError(f"{target}: has other prompts already; add yours there, or choose another name (--name)")
        return
    temporary = files.enter_context(atomic_file(target))
    temporary.write_text(text, encoding="utf-8", newline="")


def _remove(place: Path) -> None:
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place, ignore_errors=True)
    else:
        place.unlink(missing_ok=True)
