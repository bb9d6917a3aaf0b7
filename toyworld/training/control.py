"""Control networks of the embedded base model: edges, and depth that the renderer knows exactly.

The base model is frozen; a ControlNet (Zhang et al., arXiv 2302.05543) is trained with the base model's own loss.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from tav_model.annotators.edges import canny
from tav_model.base_models import load_part
from tav_model.errors import TavError
from toyworld.captions import caption, random_caption
from toyworld.depth import render_depth
from toyworld.renderer import render
from toyworld.samples import random_scene
from toyworld.scenes import OBJECTS, Scene
from toyworld.training.latents import Latents
from toyworld.training.loop import Part, Settings
from toyworld.training.vae import to_pictures, to_tensor

KINDS = ("edges", "depth")
# Share of empty captions: what they do not say, the network learns to read from the condition.
EMPTY = 0.25
# Share of depths of another object at the same place. From them, the network learns that the depth tells where the object
# is and how large, while its outline comes from the caption, so that an edit may exchange the object.
EXCHANGED = 0.5
# Exponent of the timesteps, as shares of all; below 1, more of them are noisy. There it is decided where the objects are.
NOISINESS = 0.6
# Channels of the layers that turn the condition into latents.
EMBEDDING = (16, 32, 32, 64)
GUIDANCE_SCALE, STEPS, EVALUATED = 5.0, 20, 16


class ControlPart(Part):
    """A ControlNet for the base model in a folder, trained with the squared error of the prediction.

    Args:
        settings: of the training.
        base: folder of the base model, which is not changed except for the exported ControlNet.
        kind: one of `KINDS`.
        work: folder in which the latents are cached.
        device: "cpu", "cuda", ...
        workers: processes that draw pictures; 0: this process draws them.
    """

    def __init__(self, settings: Settings, base: Path, kind: str, work: Path, device: str, workers: int = 0) -> None:
        from diffusers import UNet2DConditionModel
        from diffusers.models.attention_processor import AttnProcessor

        super().__init__(settings)
        if kind not in KINDS:
            raise TavError(f"control: {kind!r} must be one of {', '.join(KINDS)}")
        if not (base / "unet" / "config.json").is_file():
            raise TavError(f"{base}: no base model; train it first: python -m toyworld.train all")
        torch.manual_seed(settings.seed)
        self.kind, self.name, self.device = kind, f"control-{kind}", device
        self.latents = Latents(settings.seed, base / "vae", work, device, workers)
        self.vae, self.text_encoder = self.latents.vae, load_part(str(base), "text_encoder").to(device)
        self.tokenizer, self.scheduler = load_part(str(base), "tokenizer"), load_part(str(base), "scheduler")
        self.unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet", local_files_only=True).to(device)
        for frozen in (self.vae, self.text_encoder, self.unet):
            frozen.eval().requires_grad_(False)
        # On a CPU, at this size, the backward pass of the fused attention is slower.
        if device == "cpu":
            self.unet.set_attn_processor(AttnProcessor())
        self.controlnet = small_controlnet(self.unet)
        self.networks = torch.nn.ModuleDict({"controlnet": self.controlnet})
        for network in (self.unet, self.controlnet):
            network.to(memory_format=torch.channels_last)

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        """Return the batch of a step.

        `chosen` (b,): numbers of the pictures; `conditions` (b, h, w, 3) in uint8; `tokens` (b, n); `timesteps` (b,).
        """
        rng = np.random.default_rng([self.settings.seed, step, 4 + KINDS.index(self.kind)])
        size = self.settings.batch
        chosen = rng.integers(self.latents.count(step * size), size=size)
        conditions, captions = [], []
        for i in chosen:
            scene, time = self.latents.pictures.sample(int(i))
            captions.append("" if rng.random() < EMPTY else random_caption(scene, rng))
            if self.kind == "depth" and rng.random() < EXCHANGED:
                scene = scene.edited(object=OBJECTS[rng.integers(len(OBJECTS))])
            conditions.append(condition(self.kind, scene, time))
        places = ((rng.permutation(size) + rng.random(size)) / size) ** NOISINESS
        timesteps = (places * self.scheduler.config.num_train_timesteps).astype(np.int64)
        return {
            "chosen": torch.from_numpy(chosen),
            "conditions": torch.from_numpy(np.stack(conditions)),
            "tokens": self._tokens(captions),
            "timesteps": torch.from_numpy(timesteps),
        }

    def prepared(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the batch with latents, see `Latents.prepared`, and `conditions` (b, 3, h, w) in [0, 1]."""
        return self.latents.prepared(batch) | {"conditions": _to_condition(batch["conditions"])}

    def loss(self, batch: dict[str, torch.Tensor], generator: torch.Generator) -> torch.Tensor:
        """Return the mean squared error of the predicted noise or velocity."""
        with torch.no_grad():
            states = self.text_encoder(batch["tokens"]).last_hidden_state
        latents, noise = self.latents.drawn(batch, generator)
        return self._error(latents, noise, batch["timesteps"], states, batch["conditions"])

    def _error(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        states: torch.Tensor,
        conditions: torch.Tensor | None,
    ) -> torch.Tensor:
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        target = noise
        if self.scheduler.config.prediction_type == "v_prediction":
            target = self.scheduler.get_velocity(latents, noise, timesteps)
        return functional.mse_loss(self._predict(noisy, timesteps, states, conditions).float(), target)

    def _predict(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, states: torch.Tensor, conditions: torch.Tensor | None
    ) -> torch.Tensor:
        if conditions is None:
            return self.unet(noisy, timesteps, states).sample
        down, mid = self.controlnet(noisy, timesteps, states, conditions, return_dict=False)
        return self.unet(
            noisy, timesteps, states, down_block_additional_residuals=down, mid_block_additional_residual=mid
        ).sample

    def evaluate(self) -> tuple[dict[str, float], np.ndarray | None]:
        """Return metrics on held-out scenes, and a picture of conditions, pictures sampled under them, and the truth.

        The metrics are the loss with and without control, and the distance of the sampled objects from their true
        places, as a share of the picture's width.
        """
        from toyworld.truth import look, track_error

        rng = np.random.default_rng(2_000_000_083)
        scenes = [(random_scene(rng, unseen=True), float(rng.random())) for _ in range(EVALUATED)]
        pictures = np.stack([render(*one) for one in scenes])
        seen = [condition(self.kind, *one, picture) for one, picture in zip(scenes, pictures, strict=True)]
        conditions = _to_condition(torch.from_numpy(np.stack(seen))).to(self.device)
        captions = [caption(scene) for scene, _ in scenes]
        states = self._states(captions)

        mode = self.vae.encode(to_tensor(pictures, self.device)).latent_dist.mode().float()
        latents = self.vae.config.scaling_factor * mode
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1)).to(self.device)
        limit = self.scheduler.config.num_train_timesteps
        timesteps = (torch.arange(EVALUATED, device=self.device) * limit + limit // 2) // EVALUATED
        metrics = {
            "loss_unseen": self._error(latents, noise, timesteps, states, conditions).item(),
            "loss_unseen_without": self._error(latents, noise, timesteps, states, None).item(),
        }
        sampled = self._sample(states, conditions, noise)
        errors = [track_error(look(picture).region, *one) for picture, one in zip(sampled, scenes, strict=True)]
        metrics["track_error"] = float(np.mean(errors))
        rows = [np.concatenate(list(row[:8]), 1) for row in (np.stack(seen), sampled, pictures)]
        return metrics, np.concatenate(rows)

    def _sample(self, states: torch.Tensor, conditions: torch.Tensor, latents: torch.Tensor) -> np.ndarray:
        self.scheduler.set_timesteps(STEPS)
        both_states = torch.cat([self._states([""] * len(states)), states])
        both_conditions = torch.cat([conditions, conditions])
        for timestep in self.scheduler.timesteps:
            both = torch.cat([latents, latents])
            prediction = self._predict(both, timestep.to(self.device), both_states, both_conditions).float()
            empty, full = prediction.chunk(2)
            latents = self.scheduler.step(empty + GUIDANCE_SCALE * (full - empty), timestep, latents).prev_sample
        return to_pictures(self.vae.decode(latents / self.vae.config.scaling_factor).sample)

    def _tokens(self, captions: list[str]) -> torch.Tensor:
        limit = self.text_encoder.config.max_position_embeddings
        kwargs = {"padding": "max_length", "max_length": limit, "truncation": True, "return_tensors": "pt"}
        return self.tokenizer(captions, **kwargs).input_ids

    def _states(self, captions: list[str]) -> torch.Tensor:
        return self.text_encoder(self._tokens(captions).to(self.device)).last_hidden_state

    def exported(self) -> dict[str, torch.nn.Module]:
        """Return the ControlNet."""
        return {f"controlnet/{self.kind}": self.controlnet}


def condition(kind: str, scene: Scene, time: float, picture: np.ndarray | None = None) -> np.ndarray:
    """Return what the ControlNet of a kind sees of a scene at a time from 0 to 1, (128, 128, 3) in uint8.

    Args:
        kind: one of `KINDS`.
        scene: the scene.
        time: from 0 to 1.
        picture: the scene at that time, if it has been rendered already.
    """
    if kind == "depth":
        return render_depth(scene, time)
    return canny((render(scene, time) if picture is None else picture)[None])[0]


def small_controlnet(unet: Any) -> Any:
    """Return a ControlNet with the weights of an image UNet's residual blocks on the way down, and no attention.

    Without attention it has half the weights. The words reach the picture through the UNet.
    """
    from diffusers import ControlNetModel

    config = unet.config
    shared = (
        *("in_channels", "flip_sin_to_cos", "freq_shift", "block_out_channels", "layers_per_block"),
        *("downsample_padding", "act_fn", "norm_num_groups", "norm_eps", "cross_attention_dim", "attention_head_dim"),
        "resnet_time_scale_shift",
    )
    controlnet = ControlNetModel(
        **{name: config[name] for name in shared},
        down_block_types=("DownBlock2D",) * len(config.block_out_channels),
        mid_block_type="UNetMidBlock2D",
        conditioning_embedding_out_channels=EMBEDDING,
    )
    ours, theirs = controlnet.state_dict(), unet.state_dict()
    controlnet.load_state_dict({name: theirs.get(name, value) for name, value in ours.items()})
    return controlnet


def _to_condition(pictures: torch.Tensor) -> torch.Tensor:
    """Convert `b h w c` uint8 to `b c h w` from 0 to 1."""
    return pictures.permute(0, 3, 1, 2).float() / 255
