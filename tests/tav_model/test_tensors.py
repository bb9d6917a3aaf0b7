"""Tensors in files: as they were saved, and the same bytes each time."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tav_model.errors import TavError
from tav_model.tensors import load_tensors, read_metadata, read_shapes, save_tensors

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
