"""The autoencoder: 128x128 pictures to 16x16 latents of 4 channels, as Stable Diffusion's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..renderer import render_with_mask
from ..samples import random_scene
from ..scenes import Pose
from .loop import Part, Settings

SIDE = 128
CROP = 64
# Crops come from multiples of this, so that the latents' grid lies as it does in whole pictures.
GRID = 8
# The last share of the steps sees whole pictures, a quarter as many: norms see other statistics in crops.
WHOLE = 0.15
# The object is small and matters most.
OBJECT_WEIGHT = 3.0
KL_WEIGHT = 1e-5
EVALUATED = 64

CONFIG: dict[str, Any] = {
    "sample_size": SIDE,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (16, 32, 64, 96),
    "layers_per_block": 1,
    "norm_num_groups": 1,
    "mid_block_add_attention": False,
}


class VaePart(Part):
    """Squared error, weighted on the object, with a slight pull of the posterior to the unit normal distribution."""

    name = "vae"

    def __init__(self, settings: Settings) -> None:
        from diffusers import AutoencoderKL

        super().__init__(settings)
        torch.manual_seed(settings.seed)
        self.vae = AutoencoderKL(**CONFIG)
        start_as_identity(self.vae)
        self.vae.to(memory_format=torch.channels_last)
        self.networks = torch.nn.ModuleDict({"vae": self.vae})

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng([self.settings.seed, step])
        if step < (1 - WHOLE) * self.settings.steps:
            drawn = [_crop(*_picture(rng), rng) for _ in range(self.settings.batch)]
        else:
            drawn = [_picture(rng)[:2] for _ in range(max(1, self.settings.batch // 4))]
        pictures, masks = (np.stack(arrays) for arrays in zip(*drawn, strict=True))
        return {"pictures": to_tensor(pictures), "masks": torch.from_numpy(masks)[:, None]}

    def loss(self, batch: dict[str, torch.Tensor], generator: torch.Generator) -> torch.Tensor:
        pictures = batch["pictures"]
        posterior = self.vae.encode(pictures).latent_dist
        mean, deviation = posterior.mean.float(), posterior.std.float()
        noise = torch.randn(mean.shape, generator=generator).to(mean.device)
        decoded = self.vae.decode(mean + deviation * noise).sample.float()
        error = ((decoded - pictures).square() * (1 + OBJECT_WEIGHT * batch["masks"])).mean()
        divergence = (mean.square() + deviation.square() - 1 - 2 * deviation.log()).mean()
        return error + KL_WEIGHT * divergence

    def evaluate(self) -> tuple[dict[str, float], np.ndarray | None]:
        pictures, masks = unseen_pictures(EVALUATED)
        device = next(self.vae.parameters()).device
        decoded = reconstruct(self.vae, pictures, device)
        metrics = {"psnr": float(psnr(pictures, decoded).mean())}
        error = np.square((pictures.astype(np.float64) - decoded) / 255).mean(-1)
        metrics["psnr_object"] = float(-10 * np.log10((error * masks).sum() / masks.sum()))
        sheet = np.concatenate([np.concatenate(list(rows), 1) for rows in (pictures[:8], decoded[:8])])
        return metrics, sheet

    def export(self, base: Path) -> None:
        from .export import export_network

        self.vae.register_to_config(scaling_factor=scaling_factor(self.vae))
        export_network(self.vae, base / "vae")


def start_as_identity(network: torch.nn.Module) -> None:
    """Let each residual block pass on what it gets, at first: deep networks learn faster from there."""
    for name, module in network.named_modules():
        if name.endswith("conv2") and isinstance(module, torch.nn.Conv2d):
            torch.nn.init.zeros_(module.weight)


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """`b h w c` uint8 to `b c h w` float32 of -1 to 1, the channels last in memory."""
    tensor = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    return tensor.contiguous(memory_format=torch.channels_last)


def to_pictures(tensor: torch.Tensor) -> np.ndarray:
    """`b c h w` of -1 to 1 to `b h w c` uint8."""
    tensor = (tensor.float().clamp(-1, 1) + 1) * 127.5
    return tensor.round().byte().permute(0, 2, 3, 1).cpu().numpy()


def unseen_pictures(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures of held-out scenes and their objects' masks: `b h w c` uint8, `b h w` float32."""
    rng = np.random.default_rng(2_000_000_011)
    drawn = [_picture(rng, unseen=True)[:2] for _ in range(count)]
    pictures, masks = zip(*drawn, strict=True)
    return np.stack(pictures), np.stack(masks)


@torch.no_grad()
def reconstruct(vae: Any, pictures: np.ndarray, device: torch.device | str = "cpu", chunk: int = 16) -> np.ndarray:
    """Pictures through the posterior's mean and back: `b h w c` uint8."""
    decoded = []
    for part in np.array_split(pictures, range(chunk, len(pictures), chunk)):
        latents = vae.encode(to_tensor(part).to(device)).latent_dist.mode()
        decoded.append(to_pictures(vae.decode(latents).sample))
    return np.concatenate(decoded)


def psnr(pictures: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each picture in decibels, (b,); both `b h w c` uint8."""
    error = np.square((pictures.astype(np.float64) - others) / 255).mean((1, 2, 3))
    return -10 * np.log10(np.maximum(error, 1e-10))


@torch.no_grad()
def scaling_factor(vae: Any, count: int = 128) -> float:
    """What brings the latents to unit variance (Rombach et al., arXiv 2112.10752, appendix G)."""
    rng = np.random.default_rng(2_000_000_033)
    pictures = np.stack([_picture(rng)[0] for _ in range(count)])
    device = next(vae.parameters()).device
    latents = [vae.encode(to_tensor(part).to(device)).latent_dist.mode() for part in np.array_split(pictures, 8)]
    return 1 / torch.cat(latents).std().item()


def _picture(rng: np.random.Generator, unseen: bool = False) -> tuple[np.ndarray, np.ndarray, Pose]:
    scene, time = random_scene(rng, unseen), float(rng.random())
    return *render_with_mask(scene, time), scene.pose(time)


def _crop(picture: np.ndarray, mask: np.ndarray, pose: Pose, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Mostly about the object."""
    corner = rng.random(2) * (SIDE - CROP)
    if rng.random() < 0.75:
        corner = (np.array((pose.x, pose.y)) + 0.1 * rng.standard_normal(2)) * SIDE - CROP / 2
    x, y = np.clip(np.rint(corner / GRID).astype(int) * GRID, 0, SIDE - CROP)
    window = (slice(y, y + CROP), slice(x, x + CROP))
    return picture[window], mask[window]
