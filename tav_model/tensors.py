"""Tensors in safetensors files, with metadata that says what they are."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tav_model.errors import TavError
from tav_model.files import atomic_file

if TYPE_CHECKING:
    import torch

LARGEST_HEADER = 100_000_000  # bytes, as in the format's definition


def save_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write `tensors` atomically as safetensors. The same tensors and metadata always make the same bytes.

    Args:
        path: where to write.
        tensors: the tensors by name.
        metadata: what they are: stage, axis order, scale, frame rate, digest of the inputs.
    """
    from safetensors.torch import save_file

    with atomic_file(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, dict(metadata))
        _sort_metadata(temporary)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file, which the library writes in the order of a randomised hash."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        ordered = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(ordered) > length:
            raise ValueError(f"{path}: the sorted header is longer than the original one")
        file.seek(8)
        file.write(ordered.ljust(length))


def load_tensors(path: str | Path, device: str = "cpu") -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors in a safetensors file by name, and its metadata.

    Raises:
        TavError: the file is missing, truncated or not safetensors.
    """
    from safetensors import SafetensorError, safe_open

    _check_is_file(path)
    try:
        with safe_open(str(path), framework="pt", device=device) as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise TavError(f"{path}: not a complete safetensors file ({error})") from None


def read_metadata(path: str | Path) -> dict[str, str]:
    """Return the metadata of a safetensors file, without importing torch or reading tensors.

    Raises:
        TavError: the file is missing, truncated or not safetensors.
    """
    return read_shapes(path)[1]


def read_shapes(path: str | Path) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Return the shapes of the tensors in a safetensors file by name, and its metadata, without importing torch.

    Only the header is read, and compared with the size of the file.

    Raises:
        TavError: the file is missing, truncated or not safetensors.
    """
    _check_is_file(path)
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(LARGEST_HEADER, size):
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
        metadata = dict(header.pop("__metadata__", {}))
        declared = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if declared != size:
            raise ValueError(f"{size} bytes instead of {declared}")
        return {name: list(entry["shape"]) for name, entry in header.items()}, metadata
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise TavError(f"{path}: not a complete safetensors file ({error})") from None


def _check_is_file(path: str | Path) -> None:
    if not os.path.exists(path):
        raise TavError(f"{path}: no such file")
    if not os.path.isfile(path):
        raise TavError(f"{path}: is not a file")
