import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTextModel, CLIPTokenizer

from tav_model.errors import TavError
from tests.support.small_models import TINY, small_base, small_unet2d
from tests.support.standin import CONFIGS, WORDS, make_base
from toyworld.tokenizer import byte_pairs

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {kind: small_base(folder / kind, kind) for kind in CONFIGS}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_part_loads_with_the_libraries_own_classes_and_no_key_is_left_over(bases: dict[str, Path], kind: str):
    base = bases[kind]
    for cls, part in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae"), (CLIPTextModel, "text_encoder")):
        model, loading = cls.from_pretrained(base, subfolder=part, output_loading_info=True)
        assert not any(loading.values()), (part, loading)
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    scheduler = DDIMScheduler.from_pretrained(base, subfolder="scheduler")
    assert scheduler.config.prediction_type == {"sd1": "epsilon", "sd2": "v_prediction"}[kind]
    assert (scheduler.config.clip_sample, scheduler.config.set_alpha_to_one, scheduler.config.steps_offset) == (
        False,
        False,
        1,
    )
    assert CLIPTokenizer.from_pretrained(base, subfolder="tokenizer").model_max_length == 77


@pytest.mark.parametrize("kind", CONFIGS)
def test_unet_forward(bases: dict[str, Path], kind: str):
    unet = UNet2DConditionModel.from_pretrained(bases[kind], subfolder="unet")
    text = CLIPTextModel.from_pretrained(bases[kind], subfolder="text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(bases[kind], subfolder="tokenizer")
    tokens = tokenizer(["a red ball", "snow"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        context = text(tokens).last_hidden_state
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1, -1)
        predicted = unet(latents, 500, context).sample
        by_helper = small_unet2d(kind)(latents, 500, context).sample
    assert predicted.shape == (2, 4, 8, 8)
    assert predicted.isfinite().all() and 0.05 < predicted.std() < 5
    assert not torch.allclose(predicted[0], predicted[1], atol=1e-3), "the text makes no difference"
    assert torch.equal(predicted, by_helper)


def test_the_two_shapes_differ_as_stable_diffusion_1_and_2_do(bases: dict[str, Path]):
    sd1, sd2 = (UNet2DConditionModel.from_pretrained(bases[kind], subfolder="unet") for kind in CONFIGS)
    assert isinstance(sd1.config.attention_head_dim, int) and sd2.config.attention_head_dim == [2, 4]
    assert isinstance(sd1.mid_block.attentions[0].proj_in, torch.nn.Conv2d)
    assert isinstance(sd2.mid_block.attentions[0].proj_in, torch.nn.Linear)
    assert sd2.config.upcast_attention and not sd1.config.upcast_attention
    # Stable Diffusion 1 pads with the end of the text, 2 with "!".
    pads = [CLIPTokenizer.from_pretrained(bases[kind], subfolder="tokenizer").pad_token for kind in CONFIGS]
    assert pads == ["<|endoftext|>", "!"]


def test_vae_has_factor_8_and_latents_of_a_trained_ones_scale(bases: dict[str, Path]):
    vae = AutoencoderKL.from_pretrained(bases["sd1"], subfolder="vae")
    picture = 2 * torch.rand(1, 3, 64, 48, generator=torch.Generator().manual_seed(0)) - 1
    with torch.no_grad():
        posterior = vae.encode(picture).latent_dist
        means, deviations = (vae.config.scaling_factor * value for value in (posterior.mean, posterior.std))
        decoded = vae.decode(posterior.mean).sample
        of_large = vae.decode(1000 * posterior.mean).sample
    assert means.shape == (1, 4, 8, 6)
    assert 0.2 < means.std() < 5 and deviations.max() < 0.1
    assert decoded.shape == picture.shape
    assert 0.05 < decoded.std() < 2
    assert of_large.isfinite().all() and of_large.abs().max() < 20


@pytest.mark.parametrize("kind", CONFIGS)
def test_diffusers_finds_the_pipeline_and_it_renders(bases: dict[str, Path], kind: str):
    pipe = DiffusionPipeline.from_pretrained(bases[kind])
    assert type(pipe) is StableDiffusionPipeline
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a red ball", num_inference_steps=1, height=16, width=16, output_type="np").images
    assert image.shape == (1, 16, 16, 3) and np.isfinite(image).all()


@given(text=st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40))
def test_tokenizer_gives_any_ascii_text_back_but_for_case_and_spaces(bases: dict[str, Path], text: str):
    # Its own special tokens are no text.
    text = text.replace("<|", "").replace("|>", "")
    tokenizer = CLIPTokenizer.from_pretrained(bases["sd1"], subfolder="tokenizer")
    tokens = tokenizer(text).input_ids
    assert (tokens[0], tokens[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert "".join(tokenizer.decode(tokens[1:-1]).split()) == "".join(text.lower().split())


@pytest.mark.parametrize("text", ["ein grüner würfel", "一个红色的球", "crème 🦊 brûlée", "Ελλάδα"])
def test_tokenizer_spells_unknown_characters_in_bytes(bases: dict[str, Path], text: str):
    tokenizer = CLIPTokenizer.from_pretrained(bases["sd1"], subfolder="tokenizer")
    tokens = tokenizer(text).input_ids[1:-1]
    assert tokenizer.unk_token_id not in tokens
    assert tokenizer.decode(tokens) == text.lower()


def test_tokenizer_has_one_token_a_word_and_stops_at_77(bases: dict[str, Path]):
    tokenizer = CLIPTokenizer.from_pretrained(bases["sd1"], subfolder="tokenizer")
    assert [len(tokenizer(word).input_ids) for word in WORDS] == [3] * len(WORDS)
    long = tokenizer("quixotic " * 100, padding="max_length", truncation=True).input_ids
    short = tokenizer("a ball", padding="max_length", truncation=True).input_ids
    assert len(long) == len(short) == 77 and long[-1] == tokenizer.eos_token_id


@given(words=st.lists(st.text("abc", min_size=1, max_size=8), max_size=8))
def test_byte_pairs_merge_each_word_into_one_token_of_the_vocabulary(words: list[str]):
    vocabulary, merges = byte_pairs(words)
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert {f"{word}</w>" for word in words} | {"".join(pair) for pair in merges} <= set(vocabulary)
    assert byte_pairs(reversed(words)) == (vocabulary, merges)


def test_scorer_embeds_pictures_and_texts(bases: dict[str, Path]):
    model, loading = CLIPModel.from_pretrained(bases["sd1"] / "scorer", output_loading_info=True)
    assert not any(loading.values()), loading
    processor = CLIPImageProcessorPil.from_pretrained(bases["sd1"] / "scorer")
    tokenizer = CLIPTokenizer.from_pretrained(bases["sd1"] / "scorer")
    pictures = [Image.new("RGB", (80, 60), "red"), Image.effect_noise((64, 100), 90).convert("RGB")]
    pixels = processor(pictures, return_tensors="pt")
    tokens = tokenizer(["a red ball", "snow on a hill"], padding=True, return_tensors="pt")
    with torch.no_grad():
        scores = model(**pixels, **tokens)
    assert pixels.pixel_values.shape == (2, 3, 64, 64)
    similar = torch.nn.functional.cosine_similarity
    assert similar(*scores.image_embeds, dim=0) < 0.99 and similar(*scores.text_embeds, dim=0) < 0.99
    assert scores.logits_per_image.isfinite().all() and scores.logits_per_image.abs().max() <= 100.1


def test_same_seed_same_bytes_another_seed_other_weights(bases: dict[str, Path], tmp_path: Path):
    first = contents(bases["sd1"])
    assert contents(small_base(tmp_path / "again")) == first
    other = contents(small_base(tmp_path / "other", seed=1))
    assert {name for name in first if first[name] != other[name]} == {
        "standin.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "scorer/model.safetensors",
    }


@pytest.mark.parametrize("damage", ["none", "file gone", "file cut", "other seed"])
def test_a_second_call_writes_only_what_is_missing_or_different(tmp_path: Path, damage: str):
    folder = small_base(tmp_path / "base")
    whole, weights = contents(folder), folder / "unet" / "diffusion_pytorch_model.safetensors"
    before = weights.stat().st_ino, weights.stat().st_mtime_ns
    if damage == "file gone":
        (folder / "vae" / "config.json").unlink()
    elif damage == "file cut":
        os.truncate(weights, 1000)
    elif damage == "other seed":
        assert make_base(folder, seed=3, size=TINY)
        assert json.loads((folder / "standin.json").read_text())["seed"] == 3
    made = make_base(folder, size=TINY)
    assert made == (damage != "none")
    assert contents(folder) == whole
    if damage == "none":
        assert (weights.stat().st_ino, weights.stat().st_mtime_ns) == before
    assert [path.name for path in tmp_path.iterdir()] == ["base"], "a temporary folder is left"


def test_of_two_that_make_it_at_once_both_find_it_whole(tmp_path: Path, bases: dict[str, Path]):
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(small_base, [tmp_path / "base"] * 2))
    assert contents(folders[0]) == contents(bases["sd1"])
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tests.support.standin.write_tokenizer", fail)
    with pytest.raises(KeyboardInterrupt):
        small_base(tmp_path / "base")
    assert not list(tmp_path.iterdir())


def test_a_folder_of_someone_else_is_left_alone(tmp_path: Path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "thesis.txt").write_text("mine")
    with pytest.raises(TavError, match="holds something else"):
        small_base(tmp_path / "base")
    assert (tmp_path / "base" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_out_channels": (8,)}, "2 to 4 levels"),
        ({"block_out_channels": (8, 16, 16, 16, 16)}, "2 to 4 levels"),
        ({"vae_channels": (4, 8)}, "4 levels"),
        ({"norm_num_groups": 3}, "divide"),
        ({"heads": 3}, "heads 3"),
        ({"layers_per_block": 0}, "positive"),
        ({"cross_attention_dim": 6}, "4 divides"),
    ],
)
def test_impossible_sizes_are_refused(tmp_path: Path, changes: dict[str, object], message: str):
    with pytest.raises(TavError, match=message):
        small_base(tmp_path / "base", **changes)


def test_unknown_configs_and_seeds_are_refused(tmp_path: Path):
    with pytest.raises(TavError, match="sd1, sd2"):
        make_base(tmp_path / "base", "sd3")
    with pytest.raises(TavError, match="0 or more"):
        make_base(tmp_path / "base", seed=-1)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("levels", [2, 3, 4])
def test_levels(kind: str, levels: int):
    unet = small_unet2d(kind, block_out_channels=(8, 16, 16, 24)[:levels], layers_per_block=2)
    side = 2 ** (levels - 1)
    with torch.no_grad():
        assert unet(torch.zeros(1, 4, side, side), 1, torch.zeros(1, 3, 16)).sample.isfinite().all()


def test_finding_it_there_takes_no_heavy_import(bases: dict[str, Path]):
    code = (
        "import sys; from pathlib import Path; from tests.support.small_models import small_base\n"
        "small_base(Path(sys.argv[1]))\n"
        "print({'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, bases["sd1"]], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
