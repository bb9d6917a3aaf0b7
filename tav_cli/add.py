"""`tav add`: a clip into the project, and what to do with it next."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tav.media.importing import ImportedClip, import_clip
from tav_cli.terminal import Bars, print_json, say
from tav_model.errors import TavError


def add_clip(
    root: Path,
    video: Path,
    caption: str,
    name: str | None,
    edits: Sequence[str],
    size: str | None,
    frames: dict[str, int | None],
    as_json: bool,
) -> None:
    """Register a clip, and print what it is now.

    Args:
        size: WIDTHxHEIGHT.
        frames: `frames`, `start`, `end` and `stride` of the section `decode`, where the clip wants its own.

    Raises:
        TavError: as `tav.media.importing.import_clip`; the project is as it was.
    """
    decode: dict[str, Any] = {key: value for key, value in frames.items() if value is not None}
    if "stride" in decode:
        decode = {"sampling": "stride", **decode}
    if size is not None:
        decode = {**_parse_size(size), **decode}
    with Bars() as bars, bars.working(f"reading {video.name}"):
        added = import_clip(root, video, caption, name, edits, decode)
    if as_json:
        print_json(asdict(added))
        return
    print(_described(added))
    if not edits:
        say(f"no --edit was given: {added.prompts} holds the prompts; add yours there, one a line")
    say(f"next: tav run {added.name}")


def _parse_size(text: str) -> dict[str, int]:
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if not match:
        raise TavError(f"--size: {text!r} is not allowed: must be WIDTHxHEIGHT, such as 512x512")
    return {"width": int(match[1]), "height": int(match[2])}


def _described(added: ImportedClip) -> str:
    lines = [
        added.name,
        f"  video    {added.video}: {added.frames} frames of {added.width}x{added.height} are used",
        f"  caption  {added.caption}",
        f"  prompts  {added.prompts}: {', '.join(added.edits)}",
    ]
    return "\n".join(lines)
