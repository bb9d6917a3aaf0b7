"""`tav add`: copy a clip into the project, print what it is now, and what to do next."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from tav.config import ControlParams, DecodeParams, load_params
from tav.config.control import own_control_network
from tav.config.error_messages import describe_option_errors
from tav.config.prompt_words import unknown_words_warning
from tav.config.prompts import read_prompts
from tav.media.importing import ImportedClip, import_clip
from tav_cli.terminal import ProgressBars, print_json, print_message
from tav_model.errors import TavError

# A condition that the user has is a file, which only params.yaml names.
CONTROL_KINDS = [kind for kind in get_args(ControlParams.model_fields["kind"].annotation) if kind != "given"]


def add_clip(
    root: Path,
    video: Path,
    caption: str,
    name: str | None,
    edits: Sequence[str],
    size: str | None,
    frames: dict[str, int | str | None],
    as_json: bool,
    mask: Path | None = None,
    control: str | None = None,
    control_model: str | None = None,
) -> None:
    """Register a clip, and print what it is now.

    Args:
        root: the project's folder.
        video: a video, an animated GIF, or a folder of numbered images.
        caption: what the video shows.
        name: the clip's name; None: derived from the video's.
        edits: prompts for the clip's CSV.
        size: WIDTHxHEIGHT, such as 512x512.
        frames: `frames`, `start`, `end` and `stride` of the section `decode`; None: as for all clips.
        as_json: print a JSON document instead of text.
        mask: where the video is edited.
        control: what a control network sees of the clip, KIND or KIND=ANNOTATOR, such as canny.
        control_model: the network; None: the one that comes with the base model.

    Raises:
        TavError: as `tav.media.importing.import_clip`; the project is unchanged.
    """
    decode: dict[str, Any] = {
        key: int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value
        for key, value in frames.items()
        if value is not None
    }
    if "stride" in decode:
        decode = {"sampling": "stride", **decode}
    if size is not None:
        decode = {**_parse_size(size), **decode}
    _check_decode(decode)
    networks = _control(root, control, control_model)
    with ProgressBars() as bars, bars.activity(f"reading {video.name}"):
        added = import_clip(root, video, caption, name, edits, decode, mask, networks)
    prompts = [row.prompt for row in read_prompts(root / added.prompts)]
    warning = unknown_words_warning(root, load_params(root / "params.yaml").base_model, [added.caption, *prompts])
    if warning:
        print_message(f"warning: {warning}")
    if as_json:
        print_json(asdict(added))
        return
    print(_summary(added))
    if not edits:
        print_message(f"no --edit was given; add your prompts to {added.prompts}, one on each line")
    print_message(f"next: tav run {added.name}")


def _parse_size(text: str) -> dict[str, int]:
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if not match:
        raise TavError(f"--size: {text!r} is not allowed: must be WIDTHxHEIGHT, such as 512x512")
    return {"width": int(match[1]), "height": int(match[2])}


def _check_decode(decode: dict[str, Any]) -> None:
    """Check the settings of the section `decode`.

    Raises:
        TavError: values that are not allowed, with their options.
    """
    try:
        DecodeParams.model_validate(decode)
    except ValidationError as error:
        options = {"width": "--size", "height": "--size"}
        raise TavError(describe_option_errors(error, DecodeParams, options)) from None


def _control(root: Path, control: str | None, model: str | None) -> list[dict[str, str]] | None:
    """Return the clip's control as in params.yaml.

    Raises:
        TavError: the base model has no network of its own for this kind, and none is given.
    """
    if control is None:
        if model is not None:
            raise TavError("--control-model: needs --control, such as canny")
        return None
    kind, _, annotator = control.partition("=")
    if kind not in CONTROL_KINDS:
        raise TavError(f"--control: {kind!r} is not allowed: must be one of {', '.join(CONTROL_KINDS)}")
    base_model = load_params(root / "params.yaml").base_model
    network = model or own_control_network(root, base_model, kind)
    if network is None:
        raise TavError(
            f"--control: {base_model} comes without a control network for {kind!r}; name one: --control-model"
        )
    return [{"kind": kind, "model": network, **({"annotator": annotator} if annotator else {})}]


def _summary(added: ImportedClip) -> str:
    lines = [
        added.name,
        f"  video    {added.video}: uses {added.frames} frames of {added.width}x{added.height}",
        f"  caption  {added.caption}",
        f"  prompts  {added.prompts}: {', '.join(added.edits)}",
    ]
    return "\n".join(lines)
