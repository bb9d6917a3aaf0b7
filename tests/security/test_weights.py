"""Base models that are broken, lie, or carry code: refused in one line, with nothing executed and nothing written."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tasks.invert import invert
from tasks.rows import RowBatch
from tav.config import AttentionParams, EditParams, InvertParams
from tav.config.prompts import PromptRow
from tav.runtime.events import EventStream
from tav.runtime.progress import Progress
from tav_model import UNet3DConditionModel
from tav_model.base_models import base_digest, load_part
from tav_model.digests import digest
from tav_model.errors import TavError
from tav_model.tensors import save_tensors
from tav_model.text import encode_prompts
from tests.support.models import small_base
from tests.support.projects import QUICK, change_params, fresh_clone

PARTS = ("unet", "vae", "text_encoder")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def base(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "base")


def load(base: Path, part: str) -> Any:
    if part == "unet":
        return UNet3DConditionModel.from_pretrained_2d(str(base))
    return load_part(str(base), part)


def refused(base: Path, part: str) -> str:
    """The one line; the libraries say nothing beside it."""
    before = sorted(base.parent.rglob("*"))
    with pytest.raises(TavError) as error:
        load(base, part)
    assert str(error.value).startswith(str(base)) and str(error.value).isprintable()
    assert sorted(base.parent.rglob("*")) == before  # such as the mark that code in a pickle would leave
    return str(error.value)


class Bomb:
    """Unpickled, it writes a file: what a hostile checkpoint could do."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple:
        return (open, (self.mark, "w"))


def weights(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def binary(folder: Path) -> Path:
    """The name of a pickle in the place of the safetensors, which go."""
    safe = weights(folder)
    safe.unlink()
    return folder / ("pytorch_model.bin" if safe.name == "model.safetensors" else f"{safe.stem}.bin")


def changed(change: Callable[[dict[str, torch.Tensor], str], None]) -> Callable[[Path], None]:
    """Change the tensors; told the name of one of them."""

    def apply(folder: Path) -> None:
        tensors = load_file(weights(folder))
        name = min(name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.ndim > 1)
        change(tensors, name)
        save_file(tensors, weights(folder), {"format": "pt"})

    return apply


def bytes_changed(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: weights(folder).write_bytes(change(weights(folder).read_bytes()))


def header_changed(change: Callable[[dict[str, Any], list[str]], object]) -> Callable[[Path], object]:
    """Change what the header says of the tensors, whose bytes stay."""

    def apply(content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        change(header, [name for name in header if name != "__metadata__"])
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + length :]

    return bytes_changed(apply)


def set_value(tensors: dict[str, torch.Tensor], name: str, value: float) -> None:
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[0] = value


PICKLE = "anything else than tensors, refused"
HEADER = "not a complete safetensors file"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "code in a .bin": (lambda folder: torch.save({"x": Bomb(folder / "exploded")}, binary(folder)), PICKLE),
    "code in a plain pickle": (
        lambda folder: binary(folder).write_bytes(pickle.dumps(Bomb(folder / "exploded"), protocol=2)),
        PICKLE,
    ),
    "code in .safetensors": (lambda folder: torch.save({"x": Bomb(folder / "exploded")}, weights(folder)), HEADER),
    "a plain pickle in .safetensors": (
        lambda folder: weights(folder).write_bytes(pickle.dumps(Bomb(folder / "exploded"), protocol=2)),
        HEADER,
    ),
    "empty": (bytes_changed(lambda content: b""), HEADER),
    "cut in the length": (bytes_changed(lambda content: content[:5]), HEADER),
    "cut in the header": (bytes_changed(lambda content: content[:100]), HEADER),
    "cut in the tensors": (bytes_changed(lambda content: content[:-1]), HEADER),
    "a header of exabytes": (bytes_changed(lambda content: b"\xff" * 7 + b"\x7f" + content[8:]), HEADER),
    "a header of a gigabyte": (bytes_changed(lambda content: (10**9).to_bytes(8, "little") + content[8:]), HEADER),
    "beyond the file": (
        header_changed(lambda header, names: header[names[-1]].update(data_offsets=[0, 10**12])),
        HEADER,
    ),
    "before the file": (header_changed(lambda header, names: header[names[0]].update(data_offsets=[-8, 8])), HEADER),
    "overlapping": (
        header_changed(lambda header, names: header[names[0]].update(data_offsets=header[names[1]]["data_offsets"])),
        HEADER,
    ),
    "a shape without end": (header_changed(lambda header, names: header[names[0]].update(shape=[2**62] * 3)), HEADER),
    "an unknown type": (header_changed(lambda header, names: header[names[0]].update(dtype="X9")), HEADER),
    "a pipe": (lambda folder: (weights(folder).unlink(), os.mkfifo(folder / "x.safetensors")), "is not a file"),
    "a missing tensor": (changed(lambda tensors, name: tensors.pop(name)), "no weights for "),
    "a surplus tensor": (
        changed(lambda tensors, name: tensors.update(surplus=torch.ones(1))),
        "weights of another model: surplus",
    ),
    "another shape": (changed(lambda tensors, name: tensors.update({name: torch.ones(3, 3)})), "shape"),
    "NaN": (changed(lambda tensors, name: set_value(tensors, name, torch.nan)), "has values that are not finite"),
    "infinity": (changed(lambda tensors, name: set_value(tensors, name, -torch.inf)), "has values that are not finite"),
    "a config nested without end": (lambda folder: (folder / "config.json").write_text("[" * 10**5), "not a JSON file"),
    "a config of a long number": (
        lambda folder: (folder / "config.json").write_text(f'{{"in_channels": {"9" * 5000}}}'),
        "not a JSON file",
    ),
    "a config of something else": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'),
        " (",
    ),
    "a config that is a list": (lambda folder: (folder / "config.json").write_text("[]"), "not the config of a model"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("part", PARTS)
def test_a_damaged_part_is_refused(base: Path, part: str, damage: str, capfd: pytest.CaptureFixture[str]) -> None:
    make, said = DAMAGES[damage]
    make(base / part)
    capfd.readouterr()
    assert said in refused(base, part)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("part", PARTS)
def test_a_file_of_tensors_alone_is_read_whatever_its_kind(base: Path, part: str) -> None:
    wanted = load(base, part).state_dict()
    tensors = load_file(weights(base / part))
    torch.save(tensors, binary(base / part))
    loaded = load(base, part).state_dict()
    assert loaded.keys() == wanted.keys()
    # What inflation adds is random until it is tuned.
    same = [torch.equal(loaded[name], wanted[name]) for name in loaded if ".attn_temp.to_" not in name]
    assert all(same) and len(same) > 5


def test_text_encoders_of_older_libraries_are_read(base: Path) -> None:
    """They have a buffer that is computed now."""
    folder = base / "text_encoder"
    changed(lambda tensors, name: tensors.update({"embeddings.position_ids": torch.arange(77)[None]}))(folder)
    load(base, "text_encoder")


def test_a_tokenizer_without_words_is_refused(base: Path) -> None:
    for path in (base / "tokenizer").glob("*"):
        if path.name in ("vocab.json", "merges.txt", "tokenizer.json"):
            path.unlink()
    assert "tokenizer" in refused(base, "tokenizer")


def test_a_tokenizer_of_another_model_is_refused(base: Path) -> None:
    encoder, tokenizer = load(base, "text_encoder"), load(base, "tokenizer")
    encoder.config.vocab_size = 3
    with pytest.raises(TavError, match="the tokenizer is not the text encoder's"):
        encode_prompts(tokenizer, encoder, ["a red ball"])


@pytest.mark.parametrize(
    "text", ["", "[" * 10**5, '{"beta_schedule": "new"}', '{"num_train_timesteps": "many"}', '{"beta_start": null}']
)
def test_a_scheduler_that_is_none_is_refused(base: Path, text: str) -> None:
    (base / "scheduler" / "scheduler_config.json").write_text(text)
    refused(base, "scheduler")


# Weights of another clip, or of another base

ATTENTION = AttentionParams()


@pytest.fixture
def tuned(base: Path, tmp_path: Path) -> Path:
    """Weights as the stage `tune` leaves them, for latents beside them, with the noise inverted with them."""
    save_tensors(tmp_path / "latents/latents.safetensors", {"mean": torch.zeros(1, 4, 2, 8, 8)}, {"fps": "8"})
    folder = tmp_path / "tuned"
    folder.mkdir()
    load(base, "unet").save_tuned(
        folder, base_model="base", base_digest=base_digest(str(base)), clip_digest=digest(tmp_path / "latents")
    )
    sha256 = json.loads((folder / "tuned.json").read_text())["sha256"]
    noise = {"latents": torch.zeros(1, 4, 2, 8, 8)}
    save_tensors(tmp_path / "inverted/inverted.safetensors", noise, {"fps": "8", "steps": "1", "tuned": sha256})
    return folder


def batch_of(base: Path, tuned: Path) -> RowBatch:
    work = tuned.parent
    return RowBatch(
        [PromptRow(2, "a cat", "a-cat")],
        *(work / "inverted", tuned, work / "edits"),
        root=work,
        base=str(base),
        attention=ATTENTION,
        params=EditParams(negative_prompt="", guidance_scale=2.0, steps=1),
        seed=1,
        device="cpu",
        store=work / "rows",
    )


def test_weights_belong_to_a_base_and_a_clip(base: Path, tuned: Path) -> None:
    assert batch_of(base, tuned).pipeline.unet.config.temporal


def test_another_base_is_refused(base: Path, tuned: Path) -> None:
    changed(lambda tensors, name: set_value(tensors, name, 0.5))(base / "vae")
    base_digest.cache_clear()
    with pytest.raises(TavError, match="is another or has changed; tune again"):
        _ = batch_of(base, tuned).pipeline


def test_weights_of_another_clip_are_refused(base: Path, tuned: Path, tmp_path: Path) -> None:
    other = load(base, "unet")
    with torch.no_grad():
        next(iter(other.trainable_parameters().values())).add_(1)
    info = json.loads((tuned / "tuned.json").read_text())
    other.save_tuned(tuned, **{name: info[name] for name in ("base_model", "base_digest", "clip_digest")})
    with pytest.raises(TavError, match=r"not the weights that .*inverted was inverted with"):
        _ = batch_of(base, tuned).pipeline
    save_tensors(tmp_path / "latents/latents.safetensors", {"mean": torch.ones(1, 4, 2, 8, 8)}, {"fps": "8"})
    before = tree(tmp_path)
    params = InvertParams(steps=1)
    with pytest.raises(TavError, match="tuned on other latents"):
        invert(
            *(tmp_path / "latents", tuned, tmp_path / "new"),
            base=str(base),
            attention=ATTENTION,
            params=params,
            device="cpu",
            progress=Progress(EventStream(), stage="invert", total=1),
        )
    assert tree(tmp_path) == before


# In a stage


def tree(folder: Path) -> dict[str, tuple | None]:
    """Every file and folder, and for files what tells whether they were touched. A stage tests whether folders are writable."""
    return {
        str(path.relative_to(folder)): None if path.is_dir() else (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in folder.rglob("*")
    }


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with decoded frames."""
    from tasks.clip_stages import ClipStages

    folder = fresh_clone(tmp_path_factory.mktemp("project"))
    change_params(folder, QUICK | {"base_model": "models/base", "tracking": {"uri": None}})
    (folder / "models").mkdir()
    ClipStages(folder, "ball").run("decode")
    return folder


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer"])
@pytest.mark.parametrize("damage", ["code in a .bin", "NaN", "a missing tensor"])
def test_a_stage_refuses_before_it_writes(project: Path, base: Path, part: str, damage: str) -> None:
    from tasks.clip_stages import ClipStages

    if part == "tokenizer":
        (base / part / "vocab.json").write_text("{}")
    else:
        DAMAGES[damage][0](base / part)
    link = project / "models" / "base"
    link.unlink(missing_ok=True)
    link.symlink_to(base)
    before = tree(project / "results")
    with pytest.raises(TavError) as error:
        ClipStages(project, "ball").run("encode")
    assert str(error.value).isprintable()
    assert tree(project / "results") == before
    logging.shutdown()
