"""`TuneAVideoPipeline`: edited videos from prompts and inverted latents, by DDIM sampling with guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, SchedulerMixin, UNet2DConditionModel
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from einops import rearrange
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from tav_model.inversion import ddim_changes
from tav_model.latents import decode_latents, to_frames
from tav_model.networks.unet import UNet3DConditionModel
from tav_model.text import encode_prompts


@dataclass
class TuneAVideoPipelineOutput(BaseOutput):
    """`frames`: np `b f h w c` in [0, 1], pt `b c f h w` in [0, 1], a list of PIL images per video, or the latents."""

    frames: np.ndarray | torch.Tensor | list[list[Image.Image]]


class TuneAVideoPipeline(DiffusionPipeline):
    """Text to video with a tuned `UNet3DConditionModel` and the other parts of its Stable Diffusion base.

    Any scheduler of the base is replaced by DDIM with the same betas, prediction type and spacing, because only DDIM
    (deterministic at eta 0) leads back from the latents that DDIM inversion gave; see `tav_model.inversion.ddim_changes`.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _callback_tensor_inputs = ("latents", "prompt_embeds", "negative_prompt_embeds")

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet3DConditionModel,
        scheduler: SchedulerMixin,
    ) -> None:
        super().__init__()
        if isinstance(unet, UNet2DConditionModel):
            raise ValueError("unet: an image UNet must be inflated first, by UNet3DConditionModel.from_pretrained_2d")
        changes = ddim_changes(scheduler)
        fits = all(scheduler.config.get(name) == value for name, value in changes.items())
        if not (isinstance(scheduler, DDIMScheduler) and fits):
            scheduler = DDIMScheduler.from_config(scheduler.config, **changes)
        self.register_modules(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 12.5,
        negative_prompt: str | Sequence[str] | None = None,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        decode_chunk_size: int = 8,
    ) -> TuneAVideoPipelineOutput | tuple:
        """Render one video per prompt.

        Args:
            prompt: one, or a list of b. `prompt_embeds` (`b n c`) may be given instead.
            height, width, num_frames: of the video; by default those of `latents`, or the base model's size.
            guidance_scale: classifier-free guidance (Ho and Salimans, arXiv 2207.12598); 1 or less turns it off.
            negative_prompt: what to steer away from, one for all or one per prompt; by default the empty prompt.
            eta: the DDIM paper's; 0 is deterministic.
            generator: one for all, or one per video; then each video's noise is its own, and the same in any batch.
            latents: the start, `1 c f h w` shared by all prompts, or `b c f h w`. By default random noise.
            output_type: "np", "pt", "pil" or "latent".
            callback_on_step_end: called as `(pipeline, step, timestep, tensors)`; may return changed tensors.
            decode_chunk_size: frames that the VAE decodes at a time; bounds the memory.

        Raises:
            ValueError: arguments that contradict each other or the model.
        """
        if output_type not in ("np", "pt", "pil", "latent"):
            raise ValueError(f"output_type: {output_type!r} must be np, pt, pil or latent")
        if unknown := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs: {sorted(unknown)} not in {self._callback_tensor_inputs}"
            )
        device = self._execution_device
        prompt_embeds = self._embed(prompt, prompt_embeds, "prompt")
        b = prompt_embeds.shape[0]
        if isinstance(generator, list) and len(generator) != b:
            raise ValueError(f"generator: {len(generator)} for {b} prompts")
        guided = guidance_scale > 1.0
        if guided:
            negatives = negative_prompt or ""
            negatives = [negatives] * b if isinstance(negatives, str) else negatives
            negative_prompt_embeds = self._embed(negatives, negative_prompt_embeds, "negative_prompt")
            if negative_prompt_embeds.shape != prompt_embeds.shape:
                raise ValueError(f"negative_prompt: {negative_prompt_embeds.shape[0]} for {b} prompts")
        latents = self._start(latents, generator, b, num_frames, height, width, device)

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        with self.progress_bar(total=num_inference_steps) as progress:
            for step, timestep in enumerate(self.scheduler.timesteps):
                prediction = self._predict(
                    latents, timestep, prompt_embeds, negative_prompt_embeds if guided else None, guidance_scale
                )
                latents = self._denoise(prediction, timestep, latents, eta, generator)
                if callback_on_step_end is not None:
                    tensors: dict[str, Any] = {
                        "latents": latents,
                        "prompt_embeds": prompt_embeds,
                        "negative_prompt_embeds": negative_prompt_embeds,
                    }
                    chosen = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    tensors |= callback_on_step_end(self, step, timestep, chosen) or {}
                    latents, prompt_embeds, negative_prompt_embeds = tensors.values()
                progress.update()

        frames = latents if output_type == "latent" else self._finish(latents, output_type, decode_chunk_size)
        self.maybe_free_model_hooks()
        return TuneAVideoPipelineOutput(frames=frames) if return_dict else (frames,)

    def _embed(self, prompt: Any, embeds: torch.Tensor | None, name: str) -> torch.Tensor:
        if embeds is not None:
            return embeds.to(self._execution_device, self.unet.dtype)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt or ())
        if not prompts or not all(isinstance(text, str) for text in prompts):
            raise ValueError(f"{name}: {prompt!r} must be a text or a list of texts")
        return encode_prompts(self.tokenizer, self.text_encoder, prompts).to(self._execution_device, self.unet.dtype)

    def _start(
        self,
        latents: torch.Tensor | None,
        generator: torch.Generator | list[torch.Generator] | None,
        b: int,
        num_frames: int | None,
        height: int | None,
        width: int | None,
        device: torch.device,
    ) -> torch.Tensor:
        """The first latents, `b c f h w`, in float32: the network may be in half precision, the trajectory is not."""
        factor = self.vae_scale_factor
        if latents is None:
            size = self.unet.config.sample_size
            size = (size, size) if isinstance(size, int) or size is None else size
            height = height or (size[0] or 64) * factor
            width = width or (size[1] or 64) * factor
            if num_frames is None:
                raise ValueError("num_frames is needed where no latents are given")
            if height % factor or width % factor:
                raise ValueError(f"height and width: {height} and {width} must be multiples of {factor}")
            shape = (b, self.unet.config.in_channels, num_frames, height // factor, width // factor)
            noise = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
            return noise * self.scheduler.init_noise_sigma
        if latents.ndim != 5 or latents.shape[0] not in (1, b) or latents.shape[1] != self.unet.config.in_channels:
            raise ValueError(
                f"latents: {tuple(latents.shape)} must be 1 or {b}, {self.unet.config.in_channels}, f, h, w"
            )
        asked = (num_frames, height, width)
        given = (latents.shape[2], latents.shape[3] * factor, latents.shape[4] * factor)
        for name, want, have in zip(("num_frames", "height", "width"), asked, given, strict=True):
            if want is not None and want != have:
                raise ValueError(f"{name}: {want} asked for, but the latents have {have}")
        return latents.to(device, torch.float32).expand(b, -1, -1, -1, -1)

    def _predict(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        prompt_embeds: torch.Tensor,
        negative_prompt_embeds: torch.Tensor | None,
        guidance_scale: float,
    ) -> torch.Tensor:
        """`e(x, "") + g * (e(x, prompt) - e(x, ""))`, or `e(x, prompt)` without guidance."""
        sample = self.scheduler.scale_model_input(latents, timestep).to(self.unet.dtype)
        if negative_prompt_embeds is None:
            return self.unet(sample, timestep, prompt_embeds).sample.float()
        text = torch.cat([negative_prompt_embeds, prompt_embeds])
        unconditional, conditional = self.unet(torch.cat([sample, sample]), timestep, text).sample.float().chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    def _denoise(
        self,
        prediction: torch.Tensor,
        timestep: torch.Tensor,
        latents: torch.Tensor,
        eta: float,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        noise = None
        if eta > 0:
            noise = randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
        return self.scheduler.step(prediction, timestep, latents, eta=eta, variance_noise=noise).prev_sample

    def _finish(self, latents: torch.Tensor, output_type: str, chunk_size: int) -> Any:
        # The VAE is called by its methods, which the hooks of model offloading do not see.
        self.vae.to(latents.device)
        video = decode_latents(self.vae, latents, chunk_size)
        if output_type == "pt":
            return video
        if output_type == "np":
            return rearrange(video, "b c f h w -> b f h w c").numpy()
        return [[Image.fromarray(frame) for frame in to_frames(one)] for one in video]
