"""Base models made of files from the web: complete folders that diffusers and the pipeline read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from tav_model import TavError, TuneAVideoPipeline, UNet3DConditionModel
from tav_model.base_models import base_digest, load_part
from tav_model.digests import file_sha256
from tav_model.personalization.base_maker import Lora, TextualInversion, make_base
from tav_model.vocabulary import read_vocabulary
from tests.support.models import CONTEXT_DIM, image_unet, noise, small_base
from tests.support.personalisation import random_lora, single_file
from toyworld import WEIGHTS


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_base(tmp_path_factory.mktemp("base") / "small")


def unet_of(base: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(base / "unet")


def networks_of(base: Path) -> dict:
    return {"unet": unet_of(base), "text_encoder": load_part(str(base), "text_encoder")}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_fused_weights_are_the_direct_computation(base: Path, tmp_path: Path) -> None:
    before, one, two = networks_of(base), tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    ones, twos = random_lora(one, before), random_lora(two, before, "peft", alpha=1.0, seed=1)
    said: list[str] = []
    made = make_base(
        tmp_path / "new", str(base), "small", loras=[Lora(one, 0.8), Lora(two, -0.5)], announce=said.append
    )
    assert made.updated == (len(ones), len(twos)) and not made.tokens
    for part, network in networks_of(tmp_path / "new").items():
        for name, value in network.state_dict().items():
            key, expected = (part, name.removesuffix(".weight")), before[part].state_dict()[name]
            if name.endswith(".weight") and key in ones:
                expected = expected + 0.8 * ones[key] - 0.5 * 0.5 * twos[key]
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    assert said[0] == "reading small" and "adding one.safetensors" in said and "writing unet" in said


def test_what_is_written_is_a_complete_model_for_diffusers_and_for_video(base: Path, tmp_path: Path) -> None:
    lora = tmp_path / "style.safetensors"
    random_lora(lora, {"unet": unet_of(base)}, size=0.1)
    new = tmp_path / "new"
    make_base(new, str(base), "small", loras=[Lora(lora)])
    assert not list(new.rglob("*.bin"))
    images = StableDiffusionPipeline.from_pretrained(new)
    assert type(images.scheduler).__name__ == "DDIMScheduler" and images.safety_checker is None

    def video(folder: Path) -> torch.Tensor:
        torch.manual_seed(0)
        pipe = TuneAVideoPipeline.from_pretrained(folder, unet=UNet3DConditionModel.from_pretrained_2d(folder))
        pipe.set_progress_bar_config(disable=True)
        return pipe("a red ball", latents=noise(1, 4, 2, 8, 8), num_inference_steps=2, output_type="latent").frames

    assert not torch.equal(video(new), video(base))
    assert base_digest(str(new)) != base_digest(str(base))


def test_a_scale_of_zero_leaves_weights_and_tokenizer_as_they_are(base: Path, tmp_path: Path) -> None:
    lora = tmp_path / "style.safetensors"
    random_lora(lora, networks_of(base))
    make_base(tmp_path / "new", str(base), "small", loras=[Lora(lora, 0.0)])
    for part in ("unet", "vae", "text_encoder"):
        (theirs,), (ours,) = ((root / part).glob("*.safetensors") for root in (base, tmp_path / "new"))
        one, other = load_file(theirs), load_file(ours)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    for part in ("tokenizer", "scheduler"):
        assert contents(tmp_path / "new" / part) == contents(base / part)


def test_the_same_files_make_the_same_bytes_and_the_record_names_them(base: Path, tmp_path: Path) -> None:
    lora = tmp_path / "style.safetensors"
    random_lora(lora, networks_of(base))
    for name in ("one", "two"):
        make_base(tmp_path / name, str(base), "small", loras=[Lora(lora, 0.5)])
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert json.loads((tmp_path / "one/origin.json").read_text()) == {
        "base_model": "small",
        "base_digest": base_digest(str(base)),
        "single_file": None,
        "loras": [{"file": "style.safetensors", "sha256": file_sha256(lora).hexdigest(), "scale": 0.5}],
        "textual_inversions": [],
    }


def test_networks_keep_the_precision_that_they_are_stored_in(base: Path, tmp_path: Path) -> None:
    half = shutil.copytree(base, tmp_path / "half")
    for path in (half / "unet").glob("*.safetensors"):
        save_file({name: value.half() for name, value in load_file(path).items()}, path)
    checkpoint = single_file(tmp_path / "dream.safetensors", image_unet(1).bfloat16())
    random_lora(tmp_path / "style.safetensors", {"unet": unet_of(base)}, size=1e-2)
    make_base(tmp_path / "one", str(half), "half", loras=[Lora(tmp_path / "style.safetensors")])
    make_base(tmp_path / "two", str(half), "half", single_file=checkpoint)

    def precisions(name: str) -> set[torch.dtype]:
        return {value.dtype for path in (tmp_path / name).glob("*/*.safetensors") for value in load_file(path).values()}

    assert precisions("one") == {torch.float16, torch.float32}
    assert precisions("two") == {torch.bfloat16, torch.float32}


def test_single_file_then_lora(base: Path, tmp_path: Path) -> None:
    other = image_unet(7)
    checkpoint = single_file(tmp_path / "dream.safetensors", other)
    deltas = random_lora(tmp_path / "style.safetensors", {"unet": other})
    made = make_base(
        tmp_path / "new", str(base), "small", single_file=checkpoint, loras=[Lora(tmp_path / "style.safetensors")]
    )
    assert made.replaced == ("unet",)
    for name, value in unet_of(tmp_path / "new").state_dict().items():
        delta = deltas.get(("unet", name.removesuffix(".weight")), torch.zeros(()))
        expected = other.state_dict()[name] + (delta if name.endswith("weight") else 0)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


def test_new_words_are_saved_with_the_tokenizer_and_the_vocabulary(tmp_path: Path) -> None:
    save_file({"<zebra>": noise(2, 128)}, tmp_path / "zebra.safetensors")
    new = tmp_path / "new"
    made = make_base(
        new, str(WEIGHTS), "toyworld", textual_inversions=[TextualInversion(tmp_path / "zebra.safetensors")]
    )
    assert made.tokens == {"<zebra>": 2}
    tokenizer, encoder = (load_part(str(new), part) for part in ("tokenizer", "text_encoder"))
    before = load_part(str(WEIGHTS), "tokenizer")
    assert len(tokenizer) == len(before) + 2 == encoder.config.vocab_size
    assert tokenizer("a red ball").input_ids == before("a red ball").input_ids
    assert tokenizer("a <zebra>").input_ids[2] == len(before)
    vocabulary = read_vocabulary(str(new))
    assert vocabulary is not None and vocabulary.unknown_words("a red <zebra> lion") == ["lion"]
    pipe = TuneAVideoPipeline.from_pretrained(new, unet=UNet3DConditionModel.from_pretrained_2d(new))
    assert not torch.equal(*(pipe.encode_prompt(text)[0] for text in ("a <zebra>", "a ball")))


def test_two_inversions_of_one_token_need_another_name(base: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file({"<cat>": noise(CONTEXT_DIM)}, tmp_path / f"{name}.safetensors")
    inversions = [TextualInversion(tmp_path / "one.safetensors"), TextualInversion(tmp_path / "two.safetensors")]
    with pytest.raises(TavError, match=r"two\.safetensors: <cat>: the base model has this word already"):
        make_base(tmp_path / "new", str(base), "small", textual_inversions=inversions)
    inversions[1] = TextualInversion(tmp_path / "two.safetensors", "<cat2>")
    assert make_base(tmp_path / "new", str(base), "small", textual_inversions=inversions).tokens.keys() == {
        "<cat>",
        "<cat2>",
    }


def test_nothing_is_left_where_something_does_not_fit(base: Path, tmp_path: Path) -> None:
    lora = tmp_path / "style.safetensors"
    random_lora(lora, {"unet": unet_of(base)}, size=1e3)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(TavError, match=r"unet: .* is not finite any more; use smaller scales"):
        make_base(tmp_path / "new", str(base), "small", loras=[Lora(lora, 1e37)])
    assert sorted(tmp_path.rglob("*")) == before


def test_interrupted_writing_leaves_the_model_of_before(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tav_model.personalization.base_maker as base_maker

    lora = tmp_path / "style.safetensors"
    random_lora(lora, {"unet": unet_of(base)})
    make_base(tmp_path / "new", str(base), "small", loras=[Lora(lora)])
    before = contents(tmp_path)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(base_maker, "_copy_texts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_base(tmp_path / "new", str(base), "small", loras=[Lora(lora, 0.5)])
    assert contents(tmp_path) == before


@pytest.mark.parametrize("part", ["unet", "vae", "tokenizer", "scheduler"])
def test_a_base_without_a_part_is_refused(base: Path, tmp_path: Path, part: str) -> None:
    broken = shutil.copytree(base, tmp_path / "broken")
    shutil.rmtree(broken / part)
    random_lora(tmp_path / "style.safetensors", {"unet": image_unet()})
    with pytest.raises(TavError, match=rf"broken: (no {part} can be loaded|{part})"):
        make_base(tmp_path / "new", str(broken), "broken", loras=[Lora(tmp_path / "style.safetensors")])
    assert not (tmp_path / "new").exists()


def test_a_base_from_the_hub_is_downloaded_without_pickles(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(base)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    save_file({"<cat>": noise(CONTEXT_DIM)}, tmp_path / "cat.safetensors")
    inversions = [TextualInversion(tmp_path / "cat.safetensors")]
    make_base(tmp_path / "new", "someone/model", "someone/model", textual_inversions=inversions)
    ((name, patterns),) = asked
    assert name == "someone/model" and not [pattern for pattern in patterns if ".bin" in pattern]
    assert json.loads((tmp_path / "new/origin.json").read_text())["base_digest"] == "hub:someone/model"

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no network\nmore")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(TavError, match=r"\Asomeone/model: cannot be downloaded \(no network\)\Z"):
        make_base(tmp_path / "other", "someone/model", "someone/model", textual_inversions=inversions)
