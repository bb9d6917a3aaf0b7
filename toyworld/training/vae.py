"""The autoencoder: 128x128 pictures to 16x16 latents with 16 channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from tav_model.errors import TavError
from toyworld.renderer import render_with_mask
from toyworld.samples import random_scene
from toyworld.scenes import Pose
from toyworld.training.loop import Part, Settings

SIDE = 128
CROP = 64
# Crops start at multiples of this, so that the grid of the latents is the same as for complete pictures.
GRID = 8
# The last share of the steps uses complete pictures, a quarter as many: crops have other statistics in the norms.
COMPLETE = 0.1
# Weight of the object's pixels in the loss: the object is small and matters most.
OBJECT_WEIGHT = 8.0
KL_WEIGHT = 1e-5
EVALUATED = 64

CONFIG: dict[str, Any] = {
    "sample_size": SIDE,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 16,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (16, 48, 96, 160),
    "layers_per_block": 1,
    "norm_num_groups": 1,
    "mid_block_add_attention": False,
}


class VaePart(Part):
    """The autoencoder, trained with a squared error that is larger on the object, and a small KL divergence."""

    name = "vae"
    stream: tuple[int, ...] = ()  # Distinguishes the random pictures of one part from those of another.

    def __init__(self, settings: Settings) -> None:
        from diffusers import AutoencoderKL

        super().__init__(settings)
        torch.manual_seed(settings.seed)
        self.vae = AutoencoderKL(**CONFIG)
        start_as_identity(self.vae)
        self.vae.to(memory_format=torch.channels_last)
        self.networks = torch.nn.ModuleDict({"vae": self.vae})

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        """Return `pictures` (b, 3, h, w) from -1 to 1, and `masks` (b, 1, h, w) of the objects."""
        rng = np.random.default_rng([self.settings.seed, step, *self.stream])
        if step < (1 - COMPLETE) * self.settings.steps:
            drawn = [_crop(*_picture(rng), rng) for _ in range(self.settings.batch)]
        else:
            drawn = [_picture(rng)[:2] for _ in range(max(1, self.settings.batch // 4))]
        pictures, masks = (np.stack(arrays) for arrays in zip(*drawn, strict=True))
        return {"pictures": to_tensor(pictures), "masks": torch.from_numpy(masks)[:, None]}

    def loss(self, batch: dict[str, torch.Tensor], generator: torch.Generator) -> torch.Tensor:
        """Return the weighted squared error plus the weighted KL divergence from the unit normal distribution."""
        pictures = batch["pictures"]
        posterior = self.vae.encode(pictures).latent_dist
        mean, deviation = posterior.mean.float(), posterior.std.float()
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        decoded = self.vae.decode(mean + deviation * noise).sample.float()
        divergence = (mean.square() + deviation.square() - 1 - 2 * deviation.log()).mean()
        return weighted_error(decoded, batch) + KL_WEIGHT * divergence

    def evaluate(self) -> tuple[dict[str, float], np.ndarray | None]:
        """Return the PSNR of held-out pictures and of their objects in decibels, and some pictures with reconstructions."""
        pictures, masks = unseen_pictures(EVALUATED)
        device = next(self.vae.parameters()).device
        decoded = reconstruct(self.vae, pictures, device)
        metrics = {"psnr": float(psnr(pictures, decoded).mean())}
        error = np.square((pictures.astype(np.float64) - decoded) / 255).mean(-1)
        metrics["psnr_object"] = float(-10 * np.log10((error * masks).sum() / masks.sum()))
        sheet = np.concatenate([np.concatenate(list(rows), 1) for rows in (pictures[:8], decoded[:8])])
        return metrics, sheet

    def exported(self) -> dict[str, torch.nn.Module]:
        """Return the VAE."""
        return {"vae": self.vae}

    def export(self, base: Path) -> None:
        """Write the VAE, with its scaling factor, to `vae`."""
        self.vae.register_to_config(scaling_factor=scaling_factor(self.vae))
        super().export(base)


class DecoderPart(VaePart):
    """The decoder alone, trained for longer with the encoder fixed: the latents, and what depends on them, stay valid.

    Args:
        settings: of the training.
        base: folder of the base model, with its VAE.
    """

    name = "decoder"
    stream = (1,)

    def __init__(self, settings: Settings, base: Path) -> None:
        from diffusers import AutoencoderKL

        super().__init__(settings)
        if not (base / "vae" / "config.json").is_file():
            raise TavError(f"{base / 'vae'}: no VAE; train it first: python -m toyworld.train vae")
        self.vae.load_state_dict(AutoencoderKL.from_pretrained(base / "vae", local_files_only=True).state_dict())
        for fixed in (self.vae.encoder, self.vae.quant_conv):
            fixed.requires_grad_(False)

    def loss(self, batch: dict[str, torch.Tensor], generator: torch.Generator) -> torch.Tensor:
        """Return the weighted squared error."""
        pictures = batch["pictures"]
        with torch.no_grad():
            posterior = self.vae.encode(pictures).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator, device=pictures.device)
        decoded = self.vae.decode(posterior.mean.float() + posterior.std.float() * noise).sample.float()
        return weighted_error(decoded, batch)


def weighted_error(decoded: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the mean squared error, with more weight on the object."""
    return ((decoded - batch["pictures"]).square() * (1 + OBJECT_WEIGHT * batch["masks"])).mean()


def start_as_identity(network: torch.nn.Module) -> None:
    """Initialize each residual block as the identity, from which deep networks learn faster."""
    for name, module in network.named_modules():
        if name.endswith("conv2") and isinstance(module, torch.nn.Conv2d):
            torch.nn.init.zeros_(module.weight)


def to_tensor(pictures: np.ndarray, device: str | torch.device = "cpu") -> torch.Tensor:
    """Convert `b h w c` uint8 to `b c h w` float32 from -1 to 1 on a device, with channels last in memory."""
    # The device converts: a core takes longer than a GPU takes to encode the pictures.
    tensor = torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
    return tensor.contiguous(memory_format=torch.channels_last)


def to_pictures(tensor: torch.Tensor) -> np.ndarray:
    """Convert `b c h w` from -1 to 1 to `b h w c` uint8."""
    tensor = (tensor.float().clamp(-1, 1) + 1) * 127.5
    return tensor.round().byte().permute(0, 2, 3, 1).cpu().numpy()


def unseen_pictures(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return pictures of held-out scenes and masks of their objects: `b h w c` uint8, `b h w` float32."""
    rng = np.random.default_rng(2_000_000_011)
    drawn = [_picture(rng, unseen=True)[:2] for _ in range(count)]
    pictures, masks = zip(*drawn, strict=True)
    return np.stack(pictures), np.stack(masks)


@torch.no_grad()
def reconstruct(vae: Any, pictures: np.ndarray, device: torch.device | str = "cpu", chunk: int = 16) -> np.ndarray:
    """Encode pictures, `b h w c` uint8, to the posterior's mean and decode them again."""
    decoded = []
    for part in np.array_split(pictures, range(chunk, len(pictures), chunk)):
        latents = vae.encode(to_tensor(part, device)).latent_dist.mode()
        decoded.append(to_pictures(vae.decode(latents).sample))
    return np.concatenate(decoded)


def psnr(pictures: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the peak signal-to-noise ratio of each picture in decibels, (b,); both are `b h w c` uint8."""
    error = np.square((pictures.astype(np.float64) - others) / 255).mean((1, 2, 3))
    return -10 * np.log10(np.maximum(error, 1e-10))


@torch.no_grad()
def scaling_factor(vae: Any, count: int = 128) -> float:
    """Return the factor that scales the latents to unit variance (Rombach et al., arXiv 2112.10752, appendix G)."""
    rng = np.random.default_rng(2_000_000_033)
    pictures = np.stack([_picture(rng)[0] for _ in range(count)])
    device = next(vae.parameters()).device
    latents = [vae.encode(to_tensor(part, device)).latent_dist.mode() for part in np.array_split(pictures, 8)]
    return 1 / torch.cat(latents).std().item()


def _picture(rng: np.random.Generator, unseen: bool = False) -> tuple[np.ndarray, np.ndarray, Pose]:
    scene, time = random_scene(rng, unseen), float(rng.random())
    return *render_with_mask(scene, time), scene.pose(time)


def _crop(picture: np.ndarray, mask: np.ndarray, pose: Pose, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return a crop of a picture and its mask, in three of four cases near the object."""
    corner = rng.random(2) * (SIDE - CROP)
    if rng.random() < 0.75:
        corner = (np.array((pose.x, pose.y)) + 0.1 * rng.standard_normal(2)) * SIDE - CROP / 2
    x, y = np.clip(np.rint(corner / GRID).astype(int) * GRID, 0, SIDE - CROP)
    window = (slice(y, y + CROP), slice(x, x + CROP))
    return picture[window], mask[window]
