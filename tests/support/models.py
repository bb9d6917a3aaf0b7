"""Small Stable Diffusion models with random weights: their parts in memory, and as a folder in diffusers' layout.

The same arguments always make the same weights. Nothing is trained.
"""

import string
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, T2IAdapter, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tav_model import TuneAVideoPipeline, UNet3DConditionModel
from tav_model.files import write_json
from tests.support.tiny_clip import make_clip
from toyworld.tokenizer import BEGIN, END, byte_pairs, write_tokenizer

CONTEXT_DIM = 12
# A Stable Diffusion 2 UNet differs from one of Stable Diffusion 1 in these.
SD2: dict[str, Any] = {"use_linear_projection": True, "attention_head_dim": [2, 4], "upcast_attention": True}
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed))


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """`||a - b|| / ||b||`."""
    return ((ours - theirs).norm() / theirs.norm()).item()


def image_unet(seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    """Two levels, the lower one without attention, as the lowest of Stable Diffusion 1; with `**SD2`, as 2."""
    levels = len(changes.get("block_out_channels", (8, 16)))
    config = {
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": CONTEXT_DIM,
        "attention_head_dim": 2,
        "sample_size": 8,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet2DConditionModel(**config | changes).eval()


def video_unet(
    seed: int = 0, attention: tuple[str, ...] = ("first", "former"), temporal: bool = True, **changes: Any
) -> UNet3DConditionModel:
    """`image_unet` inflated, with a temporal attention that has an effect, as after some tuning."""
    unet = UNet3DConditionModel.from_unet2d(image_unet(seed, **changes), attention=attention, temporal=temporal)
    wake_temporal_attention(unet, seed)
    return unet


def wake_temporal_attention(unet: UNet3DConditionModel, seed: int = 0) -> None:
    """Random weights for every `attn_temp` and `norm_temp`, whose output is zero after inflation."""
    generator = seeded(seed + 1)
    for name, parameter in unet.named_parameters():
        if "attn_temp" in name or "norm_temp" in name:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + ("norm_temp.weight" in name))


def image_vae(seed: int = 0, **changes: Any) -> AutoencoderKL:
    """A VAE of factor 2; with four `block_out_channels`, of factor 8."""
    levels = len(changes.get("block_out_channels", (4, 8)))
    config = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": (4, 8),
        "norm_num_groups": 4,
        "latent_channels": 4,
        "sample_size": 16,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoencoderKL(**config | changes).eval()


def scale_as_if_trained(vae: AutoencoderKL) -> None:
    """Give the posterior the scale of a trained VAE's: scaled means of about unit variance, small deviations."""
    channels = vae.config.latent_channels
    kernel, bias = vae.quant_conv.weight.data, vae.quant_conv.bias.data
    kernel[:channels] *= 25
    kernel[channels:] *= 0.1
    bias[channels:] -= 12


def text_encoder(seed: int = 0, max_tokens: int = 10, **changes: Any) -> CLIPTextModel:
    """A text encoder for the vocabulary of `tokenizer`."""
    options = {
        "vocab_size": 2 * 26 + 2,
        "hidden_size": CONTEXT_DIM,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": max_tokens,
        "bos_token_id": 52,
        "eos_token_id": 53,
        "pad_token_id": 53,
    }
    config = CLIPTextConfig(**options | changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CLIPTextModel(config).eval()


def tokenizer(max_tokens: int | None = 10) -> CLIPTokenizer:
    """Every letter is a token; `max_tokens` None: the file does not say how many the model can take."""
    letters = [*string.ascii_lowercase, *(letter + "</w>" for letter in string.ascii_lowercase)]
    vocabulary = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    limit = {} if max_tokens is None else {"model_max_length": max_tokens}
    return CLIPTokenizer(vocab=vocabulary, merges=[], **limit)


def controlnet(seed: int = 0, **changes: Any) -> ControlNetModel:
    """A ControlNet for `image_unet` and `image_vae`, whose zero convolutions are random, as after some training."""
    config = {
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": CONTEXT_DIM,
        "attention_head_dim": 2,
        "conditioning_embedding_out_channels": (4, 8),
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = ControlNetModel(**config | changes).eval()
    generator = seeded(seed + 1)
    for parameter in network.parameters():
        if not parameter.any():
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return network


def t2i_adapter(seed: int = 0, **changes: Any) -> T2IAdapter:
    """A T2I-Adapter for `image_unet` and `image_vae`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return T2IAdapter(**{"channels": [8, 16], "num_res_blocks": 1, "downscale_factor": 2} | changes).eval()


def scheduler(**changes: Any) -> DDIMScheduler:
    return DDIMScheduler(**SCHEDULER | changes)


def pipeline(seed: int = 0, **parts: Any) -> TuneAVideoPipeline:
    """A pipeline without a progress bar; `parts` replace its parts."""
    made = {
        "vae": image_vae(seed),
        "text_encoder": text_encoder(seed),
        "tokenizer": tokenizer(),
        "unet": video_unet(seed),
        "scheduler": scheduler(),
    }
    pipe = TuneAVideoPipeline(**made | parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stable_diffusion_folder(folder: Path, scheduler: Any, seed: int = 0) -> Path:
    """What `StableDiffusionPipeline.save_pretrained` leaves, with a scheduler of any class."""
    from diffusers import StableDiffusionPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It has its own opinion on schedulers, and changes their options.
        pipe = StableDiffusionPipeline(
            vae=image_vae(seed),
            text_encoder=text_encoder(seed),
            tokenizer=tokenizer(),
            unet=image_unet(seed),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.save_pretrained(folder)
    scheduler.save_pretrained(folder / "scheduler")
    return folder


def small_base(folder: Path, kind: str = "sd1", seed: int = 0) -> Path:
    """Write a complete base model in diffusers' layout, with a CLIP model in `scorer` beside it.

    Args:
        folder: where to.
        kind: "sd1" predicts noise; "sd2" predicts velocity, and has linear projections, heads by level and upcast
            attention.
        seed: of the weights.
    """
    sd2 = {"sd1": False, "sd2": True}[kind]
    vocabulary, merges = byte_pairs(["a", "ball", "red"])  # Other words are spelt in bytes.
    # Stable Diffusion 2 pads prompts with "!", the first token, Stable Diffusion 1 with the end of the text.
    pad = "!" if sd2 else END
    text = {
        "vocab_size": len(vocabulary),
        "bos_token_id": vocabulary[BEGIN],
        "eos_token_id": vocabulary[END],
        "pad_token_id": vocabulary[pad],
        "hidden_act": "gelu" if sd2 else "quick_gelu",
    }
    folder.mkdir(parents=True, exist_ok=True)
    image_unet(seed, **(SD2 if sd2 else {})).save_pretrained(folder / "unet")
    vae = image_vae(seed, block_out_channels=(4, 8, 8, 8), sample_size=128)
    scale_as_if_trained(vae)
    vae.save_pretrained(folder / "vae")
    text_encoder(seed, max_tokens=77, **text).save_pretrained(folder / "text_encoder")
    write_tokenizer(folder / "tokenizer", vocabulary, merges, pad, 77)
    scheduler(prediction_type="v_prediction" if sd2 else "epsilon").save_pretrained(folder / "scheduler")
    make_clip(folder / "scorer")
    parts = {
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    missing = {key: [None, None] for key in ("feature_extractor", "image_encoder", "safety_checker")}
    index = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False, **missing, **parts}
    write_json(folder / "model_index.json", index)
    return folder
