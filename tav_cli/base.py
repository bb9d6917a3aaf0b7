"""`tav base`: make a base model of files from the web, print what it consists of, and what to do next."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from tav.config.paths import resolve_model
from tav.config.schema import CLIP_NAME, CLIP_NAME_RULE
from tav_cli.terminal import ProgressBars, print_json, print_message
from tav_model.errors import TavError
from tav_model.personalization.base_maker import Lora, MadeBase, TextualInversion, make_base

FOLDER = "models"


def make_base_model(
    root: Path,
    name: str,
    base: str,
    loras: Sequence[str],
    textual_inversions: Sequence[str],
    single_file: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write `models/NAME`, and print what it consists of.

    Args:
        root: the project's folder.
        name: of the new base model.
        base: the base model that it is made from, as in params.yaml.
        loras: FILE or FILE:SCALE.
        textual_inversions: FILE or FILE:TOKEN.
        single_file: a checkpoint whose weights take the place of the base's.
        force: replace a base model that exists.
        as_json: print a JSON document instead of text.

    Raises:
        TavError: a name that is taken or not allowed, a base model that does not exist, or a file that does not fit it. The
            project is unchanged.
    """
    if not re.fullmatch(CLIP_NAME, name):
        raise TavError(f"NAME: {name!r} is not allowed: {CLIP_NAME_RULE}")
    if not (loras or textual_inversions or single_file):
        raise TavError("nothing to add: give --lora, --textual-inversion or --single-file")
    new = f"{FOLDER}/{name}"
    if (root / new).exists() and not force:
        raise TavError(f"{new}: exists already; choose another name, or replace it (--force)")
    read_loras = [_lora(text) for text in loras]
    inversions = [TextualInversion(*_path_and_rest(text)) for text in textual_inversions]
    if single_file is not None:
        single_file = single_file.expanduser()
    paths = [lora.path for lora in read_loras] + [inversion.path for inversion in inversions]
    for path in [*paths, *([single_file] if single_file else [])]:
        if not path.is_file():
            raise TavError(f"{path}: no such file")
    folder = resolve_model(root, base)
    with ProgressBars() as bars:
        activities: list[str] = []

        def announce(activity: str) -> None:
            for before in activities:
                bars.end_activity(before)
            activities[:] = [activity]
            bars.start_activity(activity)

        made = make_base(
            root / new,
            folder,
            base,
            loras=read_loras,
            textual_inversions=inversions,
            single_file=single_file,
            announce=announce,
        )
    if as_json:
        print_json(
            {
                "base_model": new,
                "from": base,
                "replaced": list(made.replaced),
                "loras": [
                    {"file": str(lora.path), "scale": lora.scale, "modules": count}
                    for lora, count in zip(read_loras, made.updated, strict=True)
                ],
                "tokens": made.tokens,
            }
        )
        return
    print(_summary(new, base, single_file, read_loras, made))
    print_message(f"next: tav run CLIP --set base_model={new}")


def _path_and_rest(text: str) -> tuple[Path, str | None]:
    """Return the path in FILE:REST, and the rest; None where there is none. A path that exists is not split."""
    if Path(text).expanduser().exists() or ":" not in text:
        return Path(text).expanduser(), None
    path, _, rest = text.rpartition(":")
    return Path(path).expanduser(), rest


def _lora(text: str) -> Lora:
    path, rest = _path_and_rest(text)
    if rest is None:
        return Lora(path)
    try:
        scale = float(rest)
    except ValueError:
        scale = math.nan
    if not math.isfinite(scale):
        raise TavError(f"--lora: {text!r} is not allowed: must be FILE or FILE:SCALE, such as style.safetensors:0.8")
    return Lora(path, scale)


def _summary(new: str, base: str, single_file: Path | None, loras: Sequence[Lora], made: MadeBase) -> str:
    lines = [new, f"  from        {base}"]
    if single_file is not None:
        lines.append(f"  checkpoint  {single_file.name}: {', '.join(made.replaced)}")
    for lora, count in zip(loras, made.updated, strict=True):
        lines.append(f"  LoRA        {lora.path.name}, scale {lora.scale:g}: {count} modules")
    for token, vectors in made.tokens.items():
        lines.append(f"  word        {token}: {vectors} vector{'s' if vectors > 1 else ''}")
    return "\n".join(lines)
