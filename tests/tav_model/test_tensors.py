"""Tensors in files: as they were saved, and the same bytes each time."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tav_model.errors import TavError
from tav_model.tensors import (
    StoredTensor,
    TensorWriter,
    load_tensors,
    read_metadata,
    read_shape,
    read_shapes,
    save_tensors,
)

TENSORS = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.tensor([1, 2], dtype=torch.bfloat16)}
METADATA = {"stage": "encode", "axes": "b c", "fps": "8"}


def test_tensors_and_metadata_are_loaded_as_they_were_saved(tmp_path: Path):
    save_tensors(tmp_path / "x.safetensors", TENSORS, METADATA)
    tensors, metadata = load_tensors(tmp_path / "x.safetensors")
    assert tensors.keys() == TENSORS.keys() and metadata == METADATA == read_metadata(tmp_path / "x.safetensors")
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


@pytest.mark.slow
def test_another_process_writes_the_same_bytes(tmp_path: Path):
    code = (
        "import sys; from tests.tav_model.test_tensors import *\n"
        "save_tensors(sys.argv[1], TENSORS, dict(reversed(METADATA.items())))"
    )
    for seed in ("1", "2"):
        subprocess.run([sys.executable, "-c", code, tmp_path / seed], check=True, env={"PYTHONHASHSEED": seed, **PATHS})
    save_tensors(tmp_path / "own", TENSORS, METADATA)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes() == (tmp_path / "own").read_bytes()


PATHS = {"PYTHONPATH": str(Path(__file__).parents[2])}


@pytest.mark.parametrize("read", [load_tensors, read_shapes])
@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), (b"", "not a complete safetensors file"), ("cut", "not a complete safetensors file")],
)
def test_damaged_files_are_named(tmp_path: Path, read, content: bytes | str | None, message: str):
    path = tmp_path / "x.safetensors"
    if content == "cut":
        save_tensors(path, TENSORS, METADATA)
        content = path.read_bytes()[:-1]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TavError, match=f"x.safetensors: {message}"):
        read(path)


def test_a_folder_is_no_file(tmp_path: Path):
    with pytest.raises(TavError, match="is not a file"):
        load_tensors(tmp_path)


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.uint8]),
    size=st.integers(1, 3),
    metadata=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3),
)
def test_a_file_written_in_parts_is_that_written_at_once(tmp_path_factory, shape, dtype, size, metadata):
    folder = tmp_path_factory.getbasetemp()
    tensor = torch.arange(math.prod(shape)).view(shape).to(dtype)
    save_tensors(folder / "whole", {"x": tensor}, metadata)
    with TensorWriter(folder / "parts", "x", shape, dtype, metadata) as writer:
        for part in tensor.split(size):
            writer.write(part)
    assert (folder / "parts").read_bytes() == (folder / "whole").read_bytes()
    stored = StoredTensor(folder / "parts", "x")
    assert stored.shape == read_shape(folder / "parts", "x") == tuple(shape)
    assert stored.ndim == tensor.ndim and len(stored) == len(tensor)
    for index in (0, -1, slice(None), slice(1, 3)):
        assert torch.equal(stored[index], tensor[index])


def test_parts_that_do_not_fit(tmp_path):
    with TensorWriter(tmp_path / "x", "x", (2, 3), torch.float32, {}) as writer:
        with pytest.raises(ValueError, match="does not fit"):
            writer.write(torch.zeros(1, 4))
        writer.write(torch.zeros(2, 3))
        with pytest.raises(ValueError, match="does not fit"):
            writer.write(torch.zeros(1, 3))
    with pytest.raises(IndexError):
        StoredTensor(tmp_path / "x", "x")[2]
    with pytest.raises(ValueError, match="0 of 2 parts"), TensorWriter(tmp_path / "z", "x", (2, 3), torch.float32, {}):
        pass
    with pytest.raises(TavError, match="has no tensor y"):
        StoredTensor(tmp_path / "x", "y")
