"""Check the control networks of a clip, and what their conditions are made from, before any work starts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tav.config.paths import Project, project_path, resolve_model
from tav_model.errors import TavError

if TYPE_CHECKING:
    from tav.config.schema import ControlParams, Params


# The folders of a base model's own control networks, where they are not named after the kind of condition.
OWN_NETWORKS = {"canny": "edges"}


def check_control(root: Path, clip: str, params: Params) -> None:
    """Check what the parameters of a clip's control name. Nothing is imported where there is none.

    Args:
        root: the project's folder.
        clip: the clip.
        params: of the project, or of the clip.

    Raises:
        TavError: a missing model, clip or file, or a network that was made for another base model.
    """
    params = params.for_clip(clip)
    for place, one in enumerate(params.control):
        where = f"params.yaml: {control_key(clip, params)}.{place}"
        _check_condition(root, clip, params, one, where)
        _check_network(root, params.base_model, one, where)


def own_control_network(root: Path, base_model: str, kind: str) -> str | None:
    """Return the name of the control network that comes with a base model, in its folder `controlnet`; None without one.

    Args:
        root: the project's folder.
        base_model: its name in the parameters.
        kind: of the condition.
    """
    name = f"{base_model}/controlnet/{OWN_NETWORKS.get(kind, kind)}"
    try:
        return name if Path(resolve_model(root, name)).is_dir() else None
    except TavError:
        return None


def control_key(clip: str, params: Params) -> str:
    """Return the key of params.yaml that a clip's control is set by."""
    return "control" if params.clip(clip).control is None else f"clips.{clip}.control"


def _check_condition(root: Path, clip: str, params: Params, one: ControlParams, where: str) -> None:
    if one.source is not None and one.source not in params.clips:
        raise TavError(f"{where}.source: no clip named {one.source!r}; there are: {', '.join(params.clips)}")
    if one.given is not None and not project_path(root, one.given, f"{where}.given").exists():
        raise TavError(f"{where}.given: {one.given}: no such file")
    if one.kind == "depth" and one.annotator is None and not Project(root).scene(one.source or clip).exists():
        raise TavError(
            f"{where}.annotator: is missing; depth needs a model, such as depth-anything/Depth-Anything-V2-Small-hf, "
            f"because the clip {one.source or clip} has no scene file"
        )
    for name in (one.annotator, one.detector):
        if name is not None:
            _resolve(root, name, where)


def _check_network(root: Path, base_model: str, one: ControlParams, where: str) -> None:
    from tav_model.control_networks import check_control_network

    network = _resolve(root, one.model, f"{where}.model")
    try:
        check_control_network(network, resolve_model(root, base_model))
    except TavError as error:
        raise TavError(f"{where}.model: {error}") from None


def _resolve(root: Path, name: str, where: str) -> str:
    try:
        return resolve_model(root, name)
    except TavError as error:
        raise TavError(str(error).replace("params.yaml", where, 1)) from None
