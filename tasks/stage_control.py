"""The control of a stage: what `annotate` has written for it, and the signal that the method's functions take."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.model_loading import MODEL_LOADING
from tav.config.paths import resolve_model
from tav_model.digests import canonical_json, digest
from tav_model.errors import TavError
from tav_model.files import read_json
from tav_model.tensors import load_tensors

if TYPE_CHECKING:
    import numpy as np
    import torch

    from tav_model.control import ControlSignal


@dataclass(frozen=True)
class StageControl:
    """The networks that act in one stage of a clip, with their conditions; without any, it is false.

    Attributes:
        root: the project, or whichever folder the names of networks are looked up in.
        folder: the output of the stage `annotate`.
        entries: what that stage has recorded of each network, see `tasks.annotate.annotate`.
    """

    root: Path
    folder: Path | None = None
    entries: tuple[dict[str, Any], ...] = ()

    @classmethod
    def read(cls, root: Path, folder: Path, stage: str) -> StageControl:
        """Return the control of a stage; none where `annotate` has not run, as in results of earlier versions.

        Raises:
            TavError: the record is damaged.
        """
        path = folder / f"{stage}.json"
        if not path.exists():
            return cls(root)
        entries = read_json(path)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise TavError(f"{path}: not a list of control networks; annotate again (dvc repro)")
        return cls(root, folder, tuple(entries))

    def __bool__(self) -> bool:
        """Return whether any network acts."""
        return bool(self.entries)

    def with_scale(self, scale: float | None) -> StageControl:
        """Return the control with another scale of all networks; None: as the parameters set it."""
        if scale is None:
            return self
        return replace(self, entries=tuple({**entry, "scale": float(scale)} for entry in self.entries))

    @property
    def identity(self) -> str:
        """A digest of everything of the control that a result depends on; empty without control."""
        return digest(canonical_json(list(self.entries))) if self.entries else ""

    @property
    def summary(self) -> str:
        """The kinds and their scales, such as `canny 1, depth 0.5`."""
        return ", ".join(f"{entry['kind']} {entry['scale']:g}" for entry in self.entries)

    def networks(self, device: str, dtype: torch.dtype) -> list[Any]:
        """Load the networks.

        Raises:
            TavError: one is missing, damaged, or not the one that the clip was annotated for.
        """
        from tav_model.control_networks import load_control_network

        loaded = []
        for entry in self.entries:
            path = resolve_model(self.root, entry["model"])
            if network_digest(path) != entry["model_digest"]:
                raise TavError(
                    f"{path}: the control network has changed since the stage annotate; run it again "
                    "(dvc repro -s -f annotate@CLIP)"
                )
            with MODEL_LOADING:
                loaded.append(load_control_network(path, torch_dtype=dtype).requires_grad_(False).to(device))
        return loaded

    def conditions(self) -> list[np.ndarray]:
        """Return the frames that each network sees, `f h w 3` in uint8.

        Raises:
            TavError: they are missing, or damaged.
        """
        assert self.folder is not None  # noqa: S101 (entries are read from it)
        paths = [self.folder / Path(entry["condition"]).name for entry in self.entries]
        return [load_tensors(path)[0]["frames"].numpy() for path in paths]

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the pipeline, and of `ControlSignal`, that are not networks; none without control."""
        if not self.entries:
            return {}
        conditions = self.conditions()

        def of_each(name: str) -> list[Any]:
            return [entry[name] for entry in self.entries]

        return {
            "conditioning_frames": conditions if len(conditions) > 1 else conditions[0],
            "controlnet_conditioning_scale": of_each("scale"),
            "control_guidance_start": of_each("start"),
            "control_guidance_end": of_each("end"),
            "guess_mode": any(of_each("guess_mode")),
        }

    def signal(self, base: str, device: str, dtype: torch.dtype) -> ControlSignal | None:
        """Return the control as inversion and tuning take it; None where no network acts.

        Args:
            base: the folder or hub id of the base model.
            device: where the networks are loaded.
            dtype: in which precision.

        Raises:
            TavError: as `networks` and `conditions`, or a network was made for another base model.
        """
        if not self.entries:
            return None
        from tav_model.control import ControlSignal
        from tav_model.control_networks import check_control_network

        for entry in self.entries:
            check_control_network(resolve_model(self.root, entry["model"]), base)
        return ControlSignal(self.networks(device, dtype), **self.arguments())


def network_digest(path: str) -> str:
    """Return the identity of a control network: a digest of its folder, or the hub id itself."""
    return digest(Path(path)) if Path(path).is_dir() else f"hub:{path}"
