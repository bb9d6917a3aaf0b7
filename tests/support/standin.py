"""A stand-in for Stable Diffusion: the same parts, names and folder layout, small, with random weights.

Tests run the whole pipeline on it in seconds, in both of Stable Diffusion's shapes. Nothing in it is trained.
"""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tav_model.errors import TavError
from tav_model.files import atomic_folder, write_json
from toyworld.tokenizer import BEGIN, END, byte_pairs, write_tokenizer

if TYPE_CHECKING:
    import numpy as np
    import torch

CONFIGS = ("sd1", "sd2")
RECORD = "standin.json"
# Part of the record: a folder made by other code than this is made anew.
FORMAT = 1
NOTICE = "Random weights: this base model tries out the pipeline. Its edits are noise and its scores mean nothing."

MAX_TOKENS = 77
PROMPT_WORDS = """
a an and are as at ball bear bike bird black blue boat bouncing car cartoon cat city cloud cube dancing desert
dog driving eating field fire fish flower flying forest fox golden grass green hill horse house ice image in
is jumping lake light lion man moon mountain moving night of on orange painting paper photo pink plane playing
purple rabbit rain red riding river road robot running sand sea skiing sky snow space sphere standing stars
stone street style sun sunset surfing swimming sword the tiger toy train tree turning under video walking wall
water watercolor white woman wood yellow
"""
# Each becomes one token; any other text is spelt out in letters and bytes.
WORDS = tuple(PROMPT_WORDS.split())


@dataclass(frozen=True)
class Size:
    """How large a stand-in is. The default is for the demo, 3.7 million parameters in the UNet.

    Attributes:
        block_out_channels: the UNet's channels on each level, 2 to 4 levels; the VAE always has the four of factor 8.
        layers_per_block: residual blocks per level, of UNet and VAE.
        cross_attention_dim: width of the text embeddings.
        heads: attention heads; "sd2" has as many on the first level, and on every level heads of that width.
        norm_num_groups: groups of every group norm.
        vae_channels: the VAE's channels on its four levels.
    """

    block_out_channels: tuple[int, ...] = (32, 64, 96, 96)
    layers_per_block: int = 1
    cross_attention_dim: int = 64
    heads: int = 4
    norm_num_groups: int = 16
    vae_channels: tuple[int, int, int, int] = (16, 32, 32, 32)

    def __post_init__(self) -> None:
        numbers = [*self.block_out_channels, *self.vae_channels, self.layers_per_block, self.cross_attention_dim]
        if min(*numbers, self.heads, self.norm_num_groups) < 1:
            raise TavError(f"stand-in size: {self} must have positive numbers only")
        if not 2 <= len(self.block_out_channels) <= 4:
            raise TavError(f"stand-in size: block_out_channels {self.block_out_channels} must have 2 to 4 levels")
        if len(self.vae_channels) != 4:
            raise TavError(f"stand-in size: vae_channels {self.vae_channels} must have 4 levels, for the factor 8")
        if any(c % self.norm_num_groups for c in (*self.block_out_channels, *self.vae_channels)):
            raise TavError(f"stand-in size: norm_num_groups {self.norm_num_groups} must divide all channels of {self}")
        first = self.block_out_channels[0]
        if any(c % self.heads or c % (first // self.heads) for c in self.block_out_channels):
            raise TavError(f"stand-in size: heads {self.heads}, of the first level's width, must divide {self}")
        if first % 2 or self.cross_attention_dim % 4:
            raise TavError(f"stand-in size: {self} needs even channels and a cross_attention_dim that 4 divides")


def unet_config(config: str = "sd1", size: Size | None = None) -> dict[str, Any]:
    """The `UNet2DConditionModel` config of the shape "sd1" or "sd2"."""
    size = size or Size()
    levels = len(size.block_out_channels)
    shape: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ["CrossAttnDownBlock2D"] * (levels - 1) + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (levels - 1),
        "block_out_channels": list(size.block_out_channels),
        "layers_per_block": size.layers_per_block,
        "cross_attention_dim": size.cross_attention_dim,
        "norm_num_groups": size.norm_num_groups,
        # Diffusers takes this for the number of heads, whatever its name says.
        "attention_head_dim": size.heads,
    }
    if _check_config(config) == "sd2":
        head_width = size.block_out_channels[0] // size.heads
        shape["attention_head_dim"] = [channels // head_width for channels in size.block_out_channels]
        shape |= {"use_linear_projection": True, "upcast_attention": True}
    return shape


def vae_config(size: Size | None = None) -> dict[str, Any]:
    """The `AutoencoderKL` config: factor 8, 4 latent channels, Stable Diffusion's scaling factor."""
    size = size or Size()
    return {
        "_class_name": "AutoencoderKL",
        "sample_size": 128,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": list(size.vae_channels),
        "layers_per_block": size.layers_per_block,
        "norm_num_groups": size.norm_num_groups,
        "scaling_factor": 0.18215,
    }


def scheduler_config(config: str = "sd1") -> dict[str, Any]:
    """The `DDIMScheduler` config of Stable Diffusion; "sd2" predicts the velocity."""
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": "v_prediction" if _check_config(config) == "sd2" else "epsilon",
    }


def random_weights(model: torch.nn.Module, seed: int = 0, prefix: str = "") -> dict[str, np.ndarray]:
    """Random float32 weights for every parameter of ``model``, which may be on the meta device.

    A tensor depends on ``seed``, its name (``prefix`` included) and its shape alone. It is drawn by NumPy, whose
    uniform numbers are the same bits on every machine; those of torch depend on the processor. Matrices and kernels
    keep the variance of what passes through them (uniform, variance 1 / fan-in). Biases and norms lie near, not at,
    0 and 1, so that one that was not loaded shows.
    """
    import numpy as np

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if not shape:  # CLIP's temperature: the value that every trained CLIP ends at
            return np.array(math.log(100), np.float32)
        uniform = 2 * np.random.default_rng([seed, zlib.crc32(name.encode())]).random(shape, np.float32) - 1
        if len(shape) == 1:
            return np.float32(0.1) * uniform + np.float32(name.endswith("weight"))
        return np.float32(math.sqrt(3 / math.prod(shape[1:]))) * uniform

    shapes = {prefix + name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return {name: draw(name, shape) for name, shape in shapes.items()}


def random_vae_weights(vae: torch.nn.Module, seed: int = 0) -> dict[str, np.ndarray]:
    """`random_weights` with the posterior of a trained VAE: scaled means of about unit variance, small deviations."""
    weights = random_weights(vae, seed)
    channels = vae.config.latent_channels
    kernel, bias = weights["quant_conv.weight"], weights["quant_conv.bias"]
    kernel[:channels] *= 8
    kernel[channels:] *= 0.1
    bias[channels:] -= 12
    return weights


def make_base(folder: Path, config: str = "sd1", seed: int = 0, size: Size | None = None) -> bool:
    """Write a base model with random weights to ``folder``, as `StableDiffusionPipeline.save_pretrained` would.

    It has the folders unet, vae, text_encoder, tokenizer and scheduler, model_index.json, and beside them scorer (a
    CLIP model with its tokenizer and image processor) and a record of what was made. The same arguments give the
    same bytes. The folder appears whole or not at all.

    Args:
        folder: where; a folder that this function made is replaced when it differs.
        config: "sd1" (heads of one number, 1x1 convolutions as projections, predicts noise) or "sd2" (heads per
            level, linear projections, predicts velocity).
        seed: of the weights, 0 or more.
        size: see `Size`.

    Returns:
        Whether it was made; False when it was there already.

    Raises:
        TavError: unknown ``config``, negative ``seed``, or ``folder`` holds something else.
    """
    folder = Path(folder)
    size = size or Size()
    if seed < 0:
        raise TavError(f"stand-in seed: {seed} must be 0 or more")
    made_from = {
        "notice": NOTICE,
        "format": FORMAT,
        "config": _check_config(config),
        "seed": seed,
        "size": json.loads(json.dumps(asdict(size))),
    }
    if _is_complete(folder, made_from):
        return False
    if folder.exists() and not (folder.is_dir() and ((folder / RECORD).is_file() or not any(folder.iterdir()))):
        raise TavError(f"{folder}: holds something else than a stand-in; name a new or an empty folder")

    try:
        with atomic_folder(folder) as temporary:
            _write_base(temporary, config, seed, size)
            files = {path.relative_to(temporary).as_posix(): path.stat().st_size for path in _files(temporary)}
            write_json(temporary / RECORD, made_from | {"files": files})
    except OSError as error:
        # A folder cannot be renamed over another: a process that makes the same may have been first.
        if not _is_complete(folder, made_from):
            raise TavError(f"{folder}: cannot be written ({error.strerror})") from error
    return True


def _check_config(config: str) -> str:
    if config not in CONFIGS:
        raise TavError(f"stand-in config: {config!r} must be one of {', '.join(CONFIGS)}")
    return config


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _is_complete(folder: Path, made_from: dict[str, Any]) -> bool:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        files = record.pop("files")
        return record == made_from and all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, AttributeError):
        return False


def _write_base(folder: Path, config: str, seed: int, size: Size) -> None:
    """Configs are written by hand, not by `save_pretrained`, whose files name the versions of the libraries."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel

    vocabulary, merges = byte_pairs(WORDS)
    special = {"bos_token_id": vocabulary[BEGIN], "eos_token_id": vocabulary[END]}
    # Stable Diffusion 2 pads prompts with "!", the first token.
    pad = "!" if config == "sd2" else END
    text = {
        "vocab_size": len(vocabulary),
        "max_position_embeddings": MAX_TOKENS,
        "hidden_size": size.cross_attention_dim,
        "intermediate_size": 4 * size.cross_attention_dim,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "projection_dim": 32,
        "hidden_act": "gelu" if config == "sd2" else "quick_gelu",
        "pad_token_id": vocabulary[pad],
        **special,
    }
    vision = {
        "image_size": 64,
        "patch_size": 16,
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "projection_dim": 32,
    }
    scorer_text = text | {"hidden_act": "quick_gelu", "pad_token_id": vocabulary[END]}
    text_config = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", **text}
    scorer_config = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": 32,
        "text_config": {"model_type": "clip_text_model", **scorer_text},
        "vision_config": {"model_type": "clip_vision_model", **vision},
    }

    with torch.device("meta"):  # names and shapes are all that is wanted of them
        unet = UNet2DConditionModel.from_config(unet_config(config, size))
        vae = AutoencoderKL.from_config(vae_config(size))
        text_encoder = CLIPTextModel(CLIPTextConfig(**text))
        scorer = CLIPModel(CLIPConfig(**scorer_config))

    _write_model(folder / "unet", unet_config(config, size), random_weights(unet, seed), "diffusion_pytorch_model")
    _write_model(folder / "vae", vae_config(size), random_vae_weights(vae, seed), "diffusion_pytorch_model")
    # Published encoders have this prefix; transformers 5 leaves it out of the model, and takes both.
    prefix = "" if hasattr(text_encoder, "text_model") else "text_model."
    _write_model(folder / "text_encoder", text_config, random_weights(text_encoder, seed, prefix), "model")
    _write_model(folder / "scorer", scorer_config, random_weights(scorer, seed), "model")

    write_tokenizer(folder / "tokenizer", vocabulary, merges, pad, MAX_TOKENS)
    write_tokenizer(folder / "scorer", vocabulary, merges, END, MAX_TOKENS)
    side = vision["image_size"]
    image_processor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
    }
    write_json(folder / "scorer" / "preprocessor_config.json", image_processor)
    (folder / "scheduler").mkdir()
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler_config(config))
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    write_json(folder / "model_index.json", index)


def _write_model(folder: Path, config: dict[str, Any], weights: dict[str, np.ndarray], name: str) -> None:
    from safetensors.numpy import save

    folder.mkdir()
    write_json(folder / "config.json", config)
    # As bytes, because `save_file` makes the file readable by its owner alone.
    (folder / f"{name}.safetensors").write_bytes(save(weights, {"format": "pt"}))
