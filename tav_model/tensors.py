"""Tensors in safetensors files, with metadata that says what they are."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

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


class TensorWriter:
    """Write a safetensors file with one tensor, part by part along its first axis, so that it need not fit into memory.

    A complete file is the same as that of `save_tensors`. Leave it to `atomic_file` or `atomic_folder` to make it so.

    Args:
        path: where to write.
        name: of the tensor.
        shape: of the complete tensor.
        dtype: of the tensor; parts are converted to it.
        metadata: as for `save_tensors`.
    """

    def __init__(
        self, path: str | Path, name: str, shape: Sequence[int], dtype: torch.dtype, metadata: Mapping[str, str]
    ) -> None:
        self.path, self.shape, self.dtype, self._written = Path(path), tuple(shape), dtype, 0
        size = math.prod(self.shape) * dtype.itemsize
        header = {
            "__metadata__": dict(sorted(metadata.items())),
            name: {"dtype": _dtype_name(dtype), "shape": list(self.shape), "data_offsets": [0, size]},
        }
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        padded = text.ljust(-(-len(text) // 8) * 8)
        self._file = self.path.open("wb")
        self._file.write(len(padded).to_bytes(8, "little") + padded)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        if kind is None and self._written != self.shape[0]:
            raise ValueError(f"{self.path}: {self._written} of {self.shape[0]} parts were written")

    def write(self, part: torch.Tensor) -> None:
        """Append some entries of the first axis.

        Raises:
            ValueError: another shape, or too many.
        """
        import torch

        if tuple(part.shape[1:]) != self.shape[1:] or self._written + len(part) > self.shape[0]:
            raise ValueError(f"{self.path}: {tuple(part.shape)} does not fit {self.shape}")
        content = part.detach().to("cpu", self.dtype).contiguous().view(torch.uint8)
        self._file.write(content.numpy().data)
        self._written += len(part)


class StoredTensor:
    """A tensor in a safetensors file, of which only the parts that are asked for are read, along its first axis.

    Raises:
        TavError: the file is missing, damaged, or without this tensor.
    """

    def __init__(self, path: str | Path, name: str) -> None:
        self.path, self.name, self.shape = Path(path), name, read_shape(path, name)

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice) -> torch.Tensor:
        """Return an entry of the first axis, or a range of them."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(self.path), framework="pt") as file:
                part = file.get_slice(self.name)
                if isinstance(index, slice):
                    return part[index]
                place = range(len(self))[index]
                return part[place : place + 1][0]
        except (SafetensorError, OSError) as error:
            raise TavError(f"{self.path}: not a complete safetensors file ({error})") from None


def _dtype_name(dtype: torch.dtype) -> str:
    import torch

    return {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8"}[dtype]


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
    with _open_tensors(path, device) as file:
        names = file.keys()
        return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})


def check_tensors(path: str | Path) -> None:
    """Check the header of a safetensors file as strictly as a load does, without reading its tensors.

    Raises:
        TavError: the file is missing, damaged or not safetensors.
    """
    with _open_tensors(path, "cpu"):
        pass


@contextlib.contextmanager
def _open_tensors(path: str | Path, device: str) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    _check_is_file(path)
    try:
        with safe_open(str(path), framework="pt", device=device) as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise TavError(f"{path}: not a complete safetensors file ({error})") from None


def read_metadata(path: str | Path) -> dict[str, str]:
    """Return the metadata of a safetensors file, without importing torch or reading tensors.

    Raises:
        TavError: the file is missing, truncated or not safetensors.
    """
    return read_shapes(path)[1]


def read_shape(path: str | Path, name: str) -> tuple[int, ...]:
    """Return the shape of a tensor in a safetensors file, as `read_shapes`.

    Raises:
        TavError: the file is missing, truncated, not safetensors, or without this tensor.
    """
    shapes, _ = read_shapes(path)
    if name not in shapes:
        raise TavError(f"{path}: has no tensor {name}")
    return tuple(shapes[name])


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
