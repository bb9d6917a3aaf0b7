"""The denoiser and its text encoder: noise prediction on precomputed latents (Ho et al., arXiv 2006.11239)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from tav_model.errors import TavError
from tav_model.files import write_json
from toyworld.captions import caption, partial_caption, random_caption
from toyworld.renderer import render
from toyworld.samples import random_scene
from toyworld.training.latents import Latents
from toyworld.training.loop import Part, Settings
from toyworld.training.text import WIDTH, Tokens, save_tokenizer, save_vocabulary, text_config
from toyworld.training.vae import CONFIG as VAE
from toyworld.training.vae import start_as_identity, to_pictures, to_tensor

CHANNELS = VAE["latent_channels"]
# Shares of empty captions, for classifier-free guidance (Ho and Salimans, arXiv 2207.12598), and of partial ones.
EMPTY, PARTIAL = 0.1, 0.05
GUIDANCE_SCALE = 5.0
STEPS = 20

CONFIG: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (96, 192),
    "layers_per_block": 1,
    "cross_attention_dim": WIDTH,
    "norm_num_groups": 8,
    # In spite of its name, diffusers uses this as the number of heads.
    "attention_head_dim": 4,
}
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.02,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
}
INDEX = {
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


class UnetPart(Part):
    """The denoiser, trained with the squared error of the noise at stratified timesteps.

    The text encoder starts with the scorer's weights and is trained as well.

    Args:
        settings: of the training.
        base: folder of the base model, with its VAE and its scorer.
        work: folder in which the latents are cached.
        device: "cpu", "cuda", ...
        workers: processes that draw pictures; 0: this process draws them.
    """

    name = "unet"

    def __init__(self, settings: Settings, base: Path, work: Path, device: str, workers: int = 0) -> None:
        from diffusers import DDIMScheduler, UNet2DConditionModel
        from diffusers.models.attention_processor import AttnProcessor
        from transformers import CLIPTextConfig, CLIPTextModel

        super().__init__(settings)
        torch.manual_seed(settings.seed)
        self.base, self.device = base, device
        self.scheduler = DDIMScheduler.from_config(SCHEDULER)
        self.unet = UNet2DConditionModel(**CONFIG)
        start_as_identity(self.unet)
        # On a CPU, at this size, the backward pass of the fused attention is slower.
        if device == "cpu":
            self.unet.set_attn_processor(AttnProcessor())
        self.text_encoder = CLIPTextModel(CLIPTextConfig(**text_config()))
        _load_scorer_text(self.text_encoder, base / "scorer")
        self.unet.to(memory_format=torch.channels_last)
        self.networks = torch.nn.ModuleDict({"unet": self.unet, "text_encoder": self.text_encoder})
        self.tokens = Tokens(base / "scorer")
        self.latents = Latents(settings.seed, base / "vae", work, device, workers)

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        """Return the numbers of pictures `chosen` (b,), `tokens` (b, 32) and `timesteps` (b,)."""
        rng = np.random.default_rng([self.settings.seed, step, 1])
        chosen = rng.integers(self.latents.count(step * self.settings.batch), size=self.settings.batch)
        captions = []
        for i in chosen:
            scene, _ = self.latents.pictures.sample(int(i))
            share = rng.random()
            if share < EMPTY:
                captions.append("")
            elif share < EMPTY + PARTIAL:
                captions.append(partial_caption(scene, rng)[0])
            else:
                captions.append(random_caption(scene, rng))
        places = (rng.permutation(len(chosen)) + rng.random(len(chosen))) / len(chosen)
        timesteps = (places * self.scheduler.config.num_train_timesteps).astype(np.int64)
        return {
            "chosen": torch.from_numpy(chosen),
            "tokens": self.tokens(captions),
            "timesteps": torch.from_numpy(timesteps),
        }

    def prepared(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the batch with the latents of the chosen pictures, see `Latents.prepared`."""
        return self.latents.prepared(batch)

    def loss(self, batch: dict[str, torch.Tensor], generator: torch.Generator) -> torch.Tensor:
        """Return the mean squared error of the predicted noise."""
        latents, noise = self.latents.drawn(batch, generator)
        noise = noise.contiguous(memory_format=torch.channels_last)
        noisy = self.scheduler.add_noise(latents, noise, batch["timesteps"])
        states = self.text_encoder(batch["tokens"]).last_hidden_state
        return functional.mse_loss(self.unet(noisy, batch["timesteps"], states).sample.float(), noise)

    def evaluate(self) -> tuple[dict[str, float], np.ndarray | None]:
        """Return the loss on held-out scenes, and 16 sampled pictures of held-out captions."""
        from diffusers import AutoencoderKL

        rng = np.random.default_rng(2_000_000_063)
        scenes = [random_scene(rng, unseen=True) for _ in range(16)]
        vae = AutoencoderKL.from_pretrained(self.base / "vae", local_files_only=True).to(self.device)
        pictures = self._sample_pictures([caption(scene) for scene in scenes], vae)
        metrics = {"loss_unseen": self._unseen_loss(vae)}
        rows = [np.concatenate(list(pictures[i : i + 8]), 1) for i in (0, 8)]
        return metrics, np.concatenate(rows)

    def _unseen_loss(self, vae: Any) -> float:
        rng = np.random.default_rng(2_000_000_073)
        scenes = [random_scene(rng, unseen=True) for _ in range(64)]
        pictures = np.stack([render(scene, float(rng.random())) for scene in scenes])
        latents = self.latents.factor * vae.encode(to_tensor(pictures, self.device)).latent_dist.mode()
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(latents.shape, generator=generator).to(self.device)
        timesteps = torch.arange(64, device=self.device) * 1000 // 64 + 8
        states = self.text_encoder(self.tokens([caption(s) for s in scenes]).to(self.device)).last_hidden_state
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        return functional.mse_loss(self.unet(noisy, timesteps, states).sample.float(), noise).item()

    def _sample_pictures(self, captions: list[str], vae: Any) -> np.ndarray:
        self.scheduler.set_timesteps(STEPS)
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn((len(captions), CHANNELS, 16, 16), generator=generator).to(self.device)
        tokens = self.tokens([""] * len(captions) + captions).to(self.device)
        states = self.text_encoder(tokens).last_hidden_state
        for timestep in self.scheduler.timesteps:
            both = self.unet(torch.cat([latents, latents]), timestep.to(self.device), states).sample.float()
            empty, full = both.chunk(2)
            latents = self.scheduler.step(empty + GUIDANCE_SCALE * (full - empty), timestep, latents).prev_sample
        return to_pictures(vae.decode(latents / self.latents.factor).sample)

    def exported(self) -> dict[str, torch.nn.Module]:
        """Return the UNet and the text encoder."""
        return {"unet": self.unet, "text_encoder": self.text_encoder}

    def export(self, base: Path) -> None:
        """Write UNet, text encoder, tokenizer, scheduler and `model_index.json`."""
        super().export(base)
        save_tokenizer(base / "tokenizer")
        save_vocabulary(base)
        write_json(base / "scheduler" / "scheduler_config.json", SCHEDULER)
        write_json(base / "model_index.json", INDEX)


def _load_scorer_text(text_encoder: Any, scorer: Path) -> None:
    from transformers import CLIPModel

    if not (scorer / "config.json").is_file():
        raise TavError(f"{scorer}: no scorer; train it first: python -m toyworld.train clip")
    clip = CLIPModel.from_pretrained(scorer, local_files_only=True, dtype=torch.float32)
    state = clip.text_model.state_dict()
    # Older versions of transformers have one more module around the encoder.
    inner = getattr(text_encoder, "text_model", text_encoder)
    inner.load_state_dict(state)
