"""Files that personalise a base model, made at random: LoRAs in the usual formats, and single-file checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextModel

from tests.support.models import seeded

UNET_TARGETS = ("attn1.to_q", "attn2.to_k", "attn1.to_out.0", "ff.net.2", "proj_in", "conv1")
TEXT_TARGETS = ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1")


def factors(network: nn.Module, targets: tuple[str, ...], rank: int, seed: int) -> dict[str, tuple[torch.Tensor, ...]]:
    """Random `down` and `up` for each module whose name ends with one of the targets."""
    generator = seeded(seed)
    made = {}
    for name, module in network.named_modules():
        if name.endswith(targets):
            weight = module.weight
            down = torch.randn(rank, *weight.shape[1:], generator=generator)
            up = torch.randn(weight.shape[0], rank, *(1,) * (weight.ndim - 2), generator=generator)
            made[name] = (down, up)
    assert made
    return made


def kohya(network: str, name: str) -> tuple[str, str]:
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}[network]
    stem = prefix + name.replace(".", "_")
    return f"{stem}.lora_down.weight", f"{stem}.lora_up.weight"


def peft(network: str, name: str) -> tuple[str, str]:
    stem = {"unet": "unet.", "text_encoder": "text_encoder.text_model."}[network] + name
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


def bare_peft(network: str, name: str) -> tuple[str, str]:
    return f"base_model.model.{name}.lora_A.weight", f"base_model.model.{name}.lora_B.weight"


def early_diffusers(network: str, name: str) -> tuple[str, str]:
    """As `save_attn_procs` wrote attention layers, and others beside them."""
    stem, _, last = name.rpartition(".")
    if network == "unet" and name.endswith("to_out.0"):
        stem, last = stem.removesuffix(".to_out"), "to_out"
    if network == "unet" and last.startswith("to_"):
        begin = f"unet.{stem}.processor.{last}_lora"
    elif network == "text_encoder" and "self_attn" in name:
        alias = {"q_proj": "to_q", "out_proj": "to_out"}[last]
        begin = f"text_encoder.text_model.{stem}.{alias}_lora"
    else:
        begin = f"{'unet.' if network == 'unet' else 'text_encoder.text_model.'}{name}.lora"
    return f"{begin}.down.weight", f"{begin}.up.weight"


FORMATS = {"kohya": kohya, "peft": peft, "bare peft": bare_peft, "early diffusers": early_diffusers}


def random_lora(
    path: Path,
    networks: Mapping[str, nn.Module],
    style: str = "kohya",
    rank: int = 2,
    alpha: float | None = None,
    seed: int = 0,
    metadata: Mapping[str, object] | None = None,
    unet_targets: tuple[str, ...] = UNET_TARGETS,
    size: float = 1.0,
) -> dict[tuple[str, str], torch.Tensor]:
    """Write a LoRA, and return what it adds to each weight at scale 1 and an alpha of the rank."""
    tensors, deltas = {}, {}
    for network, model in networks.items():
        targets = unet_targets if network == "unet" else TEXT_TARGETS
        for name, (down, up) in factors(model, targets, rank, seed).items():
            names = FORMATS[style](network, name)
            tensors |= dict(zip(names, (down * size, up), strict=True))
            if alpha is not None:
                tensors[names[0].rpartition(".lora_")[0] + ".alpha"] = torch.tensor(alpha)
            weight = model.get_submodule(name).weight
            matrix = up.reshape(len(up), rank) @ down.reshape(rank, -1)
            deltas[network, name] = size * matrix.reshape(weight.shape)
    save_file(tensors, path, {} if metadata is None else {"lora_adapter_metadata": json.dumps(metadata)})
    return deltas


# Single files: diffusers' names turned back into those of the original code


def single_file(
    path: Path, unet: UNet2DConditionModel, vae: AutoencoderKL | None = None, text: CLIPTextModel | None = None
) -> Path:
    """Write a checkpoint as the original Stable Diffusion code does."""
    tensors = {f"model.diffusion_model.{_unet_name(unet, name)}": value for name, value in unet.state_dict().items()}
    if vae is not None:
        for name, value in vae.state_dict().items():
            attention = ".attentions." in name and name.endswith("weight") and value.ndim == 2
            tensors[f"first_stage_model.{_vae_name(vae, name)}"] = value[:, :, None, None] if attention else value
    if text is not None:
        for name, value in text.state_dict().items():
            tensors[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = value
        tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(3)[None]
    tensors |= {"alphas_cumprod": torch.linspace(1, 0, 5)}
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    return path


_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def _unet_name(unet: UNet2DConditionModel, name: str) -> str:
    ends = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    stem, _, kind = name.rpartition(".")
    if stem in ends:
        return f"{ends[stem]}.{kind}"
    layers = unet.config.layers_per_block
    part, *path = name.split(".")
    if part == "mid_block":
        kind, i, *rest = path
        place = f"middle_block.{1 if kind == 'attentions' else 2 * int(i)}"
        return ".".join([place, *_inside(kind, rest)])
    block, kind, i, *rest = path
    if part == "down_blocks":
        if kind == "downsamplers":
            return f"input_blocks.{(int(block) + 1) * (layers + 1)}.0.op.{rest[-1]}"
        place = f"input_blocks.{int(block) * (layers + 1) + int(i) + 1}.{int(kind == 'attentions')}"
        return ".".join([place, *_inside(kind, rest)])
    if kind == "upsamplers":
        has_attention = "CrossAttn" in unet.config.up_block_types[int(block)]
        return f"output_blocks.{int(block) * (layers + 1) + layers}.{1 + has_attention}.conv.{rest[-1]}"
    place = f"output_blocks.{int(block) * (layers + 1) + int(i)}.{int(kind == 'attentions')}"
    return ".".join([place, *_inside(kind, rest)])


def _inside(kind: str, rest: list[str]) -> list[str]:
    return [_RESNET[rest[0]], *rest[1:]] if kind == "resnets" else rest


def _vae_name(vae: AutoencoderKL, name: str) -> str:
    levels = len(vae.config.block_out_channels)
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    for i in range(levels):
        name = name.replace(f"encoder.down_blocks.{i}.resnets.", f"encoder.down.{i}.block.")
        name = name.replace(f"encoder.down_blocks.{i}.downsamplers.0.", f"encoder.down.{i}.downsample.")
        name = name.replace(f"decoder.up_blocks.{i}.resnets.", f"decoder.up.{levels - 1 - i}.block.")
        name = name.replace(f"decoder.up_blocks.{i}.upsamplers.0.", f"decoder.up.{levels - 1 - i}.upsample.")
    for i in range(2):
        name = name.replace(f"mid_block.resnets.{i}.", f"mid.block_{i + 1}.")
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    for ours, theirs in attention.items():
        name = name.replace(f"mid_block.attentions.0.{ours}.", f"mid.attn_1.{theirs}.")
    return name
