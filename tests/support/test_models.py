"""The small base models are what Stable Diffusion is to the libraries that load it, but for the size."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPTextModel, CLIPTokenizer

from tests.support.models import SD2, image_unet, small_base

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
KINDS = ("sd1", "sd2")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {kind: small_base(folder / kind, kind) for kind in KINDS}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", KINDS)
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


@pytest.mark.parametrize("kind", KINDS)
def test_unet_forward(bases: dict[str, Path], kind: str):
    unet = UNet2DConditionModel.from_pretrained(bases[kind], subfolder="unet")
    text = CLIPTextModel.from_pretrained(bases[kind], subfolder="text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(bases[kind], subfolder="tokenizer")
    tokens = tokenizer(["a red ball", "snow"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        context = text(tokens).last_hidden_state
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1, -1)
        predicted = unet(latents, 500, context).sample
        by_helper = image_unet(**(SD2 if kind == "sd2" else {}))(latents, 500, context).sample
    assert predicted.shape == (2, 4, 8, 8)
    assert predicted.isfinite().all() and 0.05 < predicted.std() < 5
    assert not torch.allclose(predicted[0], predicted[1], atol=1e-3), "the text makes no difference"
    assert torch.equal(predicted, by_helper)


def test_the_two_shapes_differ_as_stable_diffusion_1_and_2_do(bases: dict[str, Path]):
    sd1, sd2 = (UNet2DConditionModel.from_pretrained(bases[kind], subfolder="unet") for kind in KINDS)
    assert isinstance(sd1.config.attention_head_dim, int) and sd2.config.attention_head_dim == [2, 4]
    assert isinstance(sd1.mid_block.attentions[0].proj_in, torch.nn.Conv2d)
    assert isinstance(sd2.mid_block.attentions[0].proj_in, torch.nn.Linear)
    assert sd2.config.upcast_attention and not sd1.config.upcast_attention
    # Stable Diffusion 1 pads with the end of the text, 2 with "!".
    pads = [CLIPTokenizer.from_pretrained(bases[kind], subfolder="tokenizer").pad_token for kind in KINDS]
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


@pytest.mark.parametrize("kind", KINDS)
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


def test_tokenizer_stops_at_77_tokens(bases: dict[str, Path]):
    tokenizer = CLIPTokenizer.from_pretrained(bases["sd1"], subfolder="tokenizer")
    assert len(tokenizer("ball").input_ids) == 3
    long = tokenizer("quixotic " * 100, padding="max_length", truncation=True).input_ids
    short = tokenizer("a ball", padding="max_length", truncation=True).input_ids
    assert len(long) == len(short) == 77 and long[-1] == tokenizer.eos_token_id


def test_same_seed_same_bytes_another_seed_other_weights(bases: dict[str, Path], tmp_path: Path):
    first = contents(bases["sd1"])
    assert contents(small_base(tmp_path / "again")) == first
    other = contents(small_base(tmp_path / "other", seed=1))
    assert {name for name in first if first[name] != other[name]} == {
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    }
