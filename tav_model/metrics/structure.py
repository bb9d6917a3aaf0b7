"""Structure distance: how far an edit changes the layout of the source, by the self-similarity of image features."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from tav_model.errors import TavError
from tav_model.metrics.temporal import check_frames

if TYPE_CHECKING:
    import torch


class StructureModel:
    """A vision transformer whose patches are compared, such as facebook/dino-vitb8.

    Args:
        model: a folder or hub id, of transformers' ``ViTModel``.
        device: where it runs.

    Raises:
        TavError: the model cannot be loaded.
    """

    def __init__(self, model: str, device: str = "cpu") -> None:
        from pathlib import Path

        from transformers import AutoImageProcessor, ViTModel

        local = Path(model).is_dir()
        try:
            self.model = (
                ViTModel.from_pretrained(model, add_pooling_layer=False, local_files_only=local).to(device).eval()
            )
            self.processor = AutoImageProcessor.from_pretrained(model, local_files_only=local)
        except Exception as error:  # Damaged files make the library raise errors of any type.
            raise TavError(f"{model}: no vision transformer can be loaded from it ({error})") from error

    def keys(self, frames: np.ndarray, chunk: int = 8) -> Iterator[torch.Tensor]:
        """Yield the keys of the last layer for each frame, ``n c``: the class token and the patches."""
        import torch

        check_frames(frames)
        seen: list[torch.Tensor] = []
        (layer,) = [module for name, module in self.model.named_modules() if name.endswith(self._key_layer())]
        handle = layer.register_forward_hook(lambda _, __, output: seen.append(output))
        try:
            for start in range(0, len(frames), chunk):
                images = list(frames[start : start + chunk])
                pixels = self.processor(images=images, return_tensors="pt").pixel_values
                with torch.no_grad():
                    self.model(pixels.to(self.model.device), interpolate_pos_encoding=True)
                yield from seen.pop()
        finally:
            handle.remove()

    def _key_layer(self) -> str:
        """Return the end of the name of the last layer's projection to keys."""
        names = [
            name
            for name, _ in self.model.named_modules()
            if name.rpartition(".")[2] in ("key", "k_proj") and f".{self.model.config.num_hidden_layers - 1}." in name
        ]
        if len(names) != 1:
            raise TavError("structure model: not a vision transformer with keys")
        return names[0]


def structure_distance(model: StructureModel, frames: np.ndarray, source: np.ndarray) -> float:
    """Structure distance (Tumanyan et al., CVPR 2022, arXiv 2201.00424, as used by Plug-and-Play): 0 for equal frames.

    The mean squared difference between the self-similarities of edit and source, where the self-similarity of a frame is the
    matrix of cosines between the keys of its patches in the last layer. It compares layout and shape, not colour.

    Raises:
        TavError: numbers of frames that differ.
    """
    if len(frames) != len(source):
        raise TavError(f"frames: {len(frames)}, but the source has {len(source)}; they must agree")
    distances = []
    for ours, theirs in zip(model.keys(frames), model.keys(source), strict=True):
        difference = _self_similarity(ours) - _self_similarity(theirs)
        distances.append(float((difference**2).mean()))
    return float(np.mean(distances))


def _self_similarity(keys: torch.Tensor) -> torch.Tensor:
    unit = keys / keys.norm(dim=-1, keepdim=True).clamp(min=1e-8)
    return unit @ unit.T
