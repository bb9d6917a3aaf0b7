"""`tav base`: a new base model that clips can use, or one line about what does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from tests.support.personalisation import random_lora, single_file
from tests.support.tav_command import Tav, contents
from toyworld import WEIGHTS


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    unet = UNet2DConditionModel.from_pretrained(WEIGHTS / "unet")
    random_lora(folder / "style.safetensors", {"unet": unet}, size=1e-2)
    save_file({"<zebra>": torch.ones(2, 128)}, folder / "zebra.safetensors")
    single_file(folder / "dream.safetensors", unet)
    return folder


def test_base_writes_a_model_and_says_how_to_use_it(tav: Tav, new: Path, files: Path) -> None:
    ended = tav(
        *("base", "sketch", "--from", "toyworld", "--single-file", files / "dream.safetensors"),
        *("--lora", f"{files}/style.safetensors:0.5", "--lora", files / "style.safetensors"),
        *("--textual-inversion", files / "zebra.safetensors"),
    )
    assert ended.code == 0, ended.err
    modules = len(load_file(files / "style.safetensors")) // 2
    assert ended.out.splitlines() == [
        "models/sketch",
        "  from        toyworld",
        "  checkpoint  dream.safetensors: unet",
        f"  LoRA        style.safetensors, scale 0.5: {modules} modules",
        f"  LoRA        style.safetensors, scale 1: {modules} modules",
        "  word        <zebra>: 2 vectors",
    ]
    assert ended.err == "next: tav run CLIP --set base_model=models/sketch\n"


def test_base_prints_json(tav: Tav, new: Path, files: Path) -> None:
    ended = tav("base", "z", "--from", "toyworld", "--textual-inversion", f"{files}/zebra.safetensors:<z>", "--json")
    assert json.loads(ended.out) == {
        "base_model": "models/z",
        "from": "toyworld",
        "replaced": [],
        "loras": [],
        "tokens": {"<z>": 2},
    }


def test_a_base_of_this_name_is_replaced_only_by_force(tav: Tav, new: Path, files: Path) -> None:
    command = ("base", "z", "--from", "toyworld", "--lora", f"{files}/style.safetensors:0.1")
    assert tav(*command).code == 0
    before = contents(new)
    assert "models/z: exists already; choose another name, or replace it (--force)" in tav(*command).error
    assert contents(new) == before
    assert tav(*command[:-1], f"{files}/style.safetensors:0.2", "--force").code == 0
    assert json.loads((new / "models/z/origin.json").read_text())["loras"][0]["scale"] == 0.2


@pytest.mark.parametrize(
    ("name", "options", "error"),
    [
        ("../x", ["--lora", "FILES/style.safetensors"], "NAME: '../x' is not allowed: must be 1 to 64 of a-z"),
        ("x", [], "nothing to add: give --lora, --textual-inversion or --single-file"),
        ("x", ["--lora", "FILES/none.safetensors:0.5"], "none.safetensors: no such file"),
        ("x", ["--lora", "FILES/style.safetensors:strong"], "must be FILE or FILE:SCALE, such as"),
        ("x", ["--lora", "FILES/style.safetensors:nan"], "must be FILE or FILE:SCALE, such as"),
        ("x", ["--single-file", "FILES/none"], "none: no such file"),
        ("x", ["--lora", "FILES/zebra.safetensors"], "<zebra> is no part of a LoRA; allowed: LoRA of diffusers"),
        ("x", ["--textual-inversion", "FILES/style.safetensors"], "not a textual inversion: one tensor"),
        ("x", ["--single-file", "FILES/style.safetensors"], "for a LoRA, use --lora"),
        ("x", ["--lora", "FILES/dream.safetensors"], "for a checkpoint, use --single-file"),
        ("x", ["--from", "none", "--lora", "FILES/style.safetensors"], "no model 'none': it is neither a folder"),
        ("x", ["--from", "../none", "--lora", "FILES/style.safetensors"], "must be a relative path inside the project"),
    ],
)
def test_base_refuses_mistakes_and_changes_nothing(
    tav: Tav, new: Path, files: Path, name: str, options: list[str], error: str
) -> None:
    before = contents(new)
    given = [option.replace("FILES", str(files)) for option in options]
    ended = tav("base", name, *([] if "--from" in given else ["--from", "toyworld"]), *given)
    assert ended.code == 2 and error in ended.error
    assert contents(new) == before
