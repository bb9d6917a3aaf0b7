"""`TuneAVideoPipeline`: edited videos from prompts and inverted latents, by guided sampling, with control over the source."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    MultiControlNetModel,
    SchedulerMixin,
    UNet2DConditionModel,
)
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from einops import rearrange
from PIL import Image
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from tav_model.attention_control import AttentionControl, AttentionControlOptions, WordMaps, check_share
from tav_model.blending import THRESHOLD, Blending, latent_mask, paste, pixel_masks
from tav_model.control import ControlSignal
from tav_model.control_networks import check_fits, control_networks
from tav_model.difference_mask import DIFFERENCE_THRESHOLD, difference_mask
from tav_model.fresh_noise import with_fresh_noise
from tav_model.guidance import guided_prediction, guided_steps
from tav_model.inversion import ddim_overrides
from tav_model.latents import decode_latents, to_frames
from tav_model.networks.feature_reuse import FeatureReuse
from tav_model.networks.text_projections import TextBatches, text_projected_once
from tav_model.networks.unet import UNet3DConditionModel
from tav_model.propagation import Propagation
from tav_model.sampling import SAMPLERS, DDIMSampler, first_sampled_step
from tav_model.tensors import StoredTensor
from tav_model.text import encode_prompts
from tav_model.trajectory import Trajectory, inversion_timesteps
from tav_model.weight_checks import without_torchvision_advice
from tav_model.windows import Window, WindowOptions, predict_in_windows, select

WORDS = "words"
"""The value of `mask` that derives it from the words that the prompts change."""
DIFFERENCE = "difference"
"""The value of `mask` that derives it from the predictions that the prompts change."""
PROPAGATED = ("attention_propagation", "feature_propagation")
"""What is averaged along the motion of the source."""
WORD_MASK_START = 0.2
"""Share of the steps after which masks from words are used: before, their maps say little."""


@dataclass
class TuneAVideoPipelineOutput(BaseOutput):
    """Output of `TuneAVideoPipeline`.

    Attributes:
        frames: NumPy array `b f h w c` in [0, 1], tensor `b c f h w` in [0, 1], one list of PIL images for each video, or
            latents `b c f h w`, as `output_type` asks for.
        masks: where the latents were generated rather than the source's, `b f h w`, 0 or 1; None without a mask.
    """

    frames: np.ndarray | torch.Tensor | list[list[Image.Image]]
    masks: torch.Tensor | None = None


class TuneAVideoPipeline(DiffusionPipeline):
    """Text to video with a tuned `UNet3DConditionModel` and the other parts of its Stable Diffusion base.

    Whatever scheduler the base has, its betas, prediction type and spacing are used with DDIM or, on request, with
    DPM-Solver++(2M): they start from the latents of DDIM inversion, see `tav_model.inversion.ddim_overrides`.

    `controlnet` is a `ControlNetModel`, a `T2IAdapter`, a list of them, or a `MultiControlNetModel`. It acts where
    `conditioning_frames` are given.
    """

    _optional_components: ClassVar[list[str]] = ["controlnet"]
    model_cpu_offload_seq = "text_encoder->unet->vae"
    _callback_tensor_inputs = ("latents", "prompt_embeds", "negative_prompt_embeds")

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet3DConditionModel,
        scheduler: SchedulerMixin,
        controlnet: nn.Module | Sequence[nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(unet, UNet2DConditionModel):
            raise ValueError("unet: an image UNet must be inflated first, by UNet3DConditionModel.from_pretrained_2d")
        overrides = ddim_overrides(scheduler)
        fits = all(scheduler.config.get(name) == value for name, value in overrides.items())
        if not (isinstance(scheduler, DDIMScheduler) and fits):
            scheduler = DDIMScheduler.from_config(scheduler.config, **overrides)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        if controlnet is not None:
            for network in control_networks(controlnet):
                check_fits(network, unet, self.vae_scale_factor)
            if not isinstance(controlnet, nn.Module):
                controlnet = MultiControlNetModel(controlnet)
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            controlnet=controlnet,
        )

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> TuneAVideoPipeline:
        """Load the pipeline as `DiffusionPipeline.from_pretrained` does; pass the inflated UNet as `unet`."""
        with without_torchvision_advice():
            return super().from_pretrained(*args, **kwargs)

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
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        decode_chunk_size: int = 8,
        conditioning_frames: Any = None,
        controlnet_conditioning_scale: float | Sequence[float] = 1.0,
        control_guidance_start: float | Sequence[float] = 0.0,
        control_guidance_end: float | Sequence[float] = 1.0,
        guess_mode: bool = False,
        controlnet_chunk_size: int = 16,
        sampler: str = "ddim",
        num_inversion_steps: int | None = None,
        trajectory: torch.Tensor | StoredTensor | None = None,
        layout_strength: float | None = None,
        mean_match: float = 0.0,
        deviation_match: float = 0.0,
        strength: float = 1.0,
        fresh_noise: float = 0.0,
        fresh_noise_seed: int | Sequence[int] = 0,
        source_prompt: str | None = None,
        source_prompt_embeds: torch.Tensor | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        mask: torch.Tensor | np.ndarray | str | None = None,
        mask_inverted: bool = False,
        mask_start: float | None = None,
        mask_end: float = 1.0,
        mask_threshold: float = THRESHOLD,
        difference_threshold: float = DIFFERENCE_THRESHOLD,
        mask_feather: float = 8.0,
        video: np.ndarray | None = None,
        proximal_quantile: float | None = None,
        source_negative: float = 0.0,
        source_negative_weight: float = 1.0,
        attention_propagation: float = 0.0,
        feature_propagation: float = 0.0,
        guidance_start: float = 0.0,
        guidance_end: float = 1.0,
        feature_reuse_interval: int = 1,
        context_length: int | None = None,
        context_stride: int | None = None,
        context_anchor: bool = True,
        context_weighting: str = "pyramid",
    ) -> TuneAVideoPipelineOutput | tuple[Any]:
        """Render one video for each prompt.

        What is taken over from the source reads its latents from `trajectory`: injected attention and attention to words
        (`cross_attention_kwargs`), which add one row to the batch, and blending (`mask`), which does not.

        Args:
            prompt: one, or a list of b. `prompt_embeds` (`b n c`) may take its place.
            height: of the video in pixels; by default that of `latents`, or the base model's.
            width: as `height`.
            num_frames: by default that of `latents`.
            num_inference_steps: steps of the scheduler.
            guidance_scale: classifier-free guidance (Ho and Salimans, arXiv 2207.12598); 1 or less turns it off.
            negative_prompt: what to steer away from, one for all or one for each prompt; by default the empty prompt.
            eta: as in the DDIM paper (arXiv 2010.02502, equation 16); 0 is deterministic.
            generator: one for all, or one for each video, whose noise then does not depend on the rest of the batch.
            latents: the first latents, `1 c f h w` for all prompts or `b c f h w`. By default random noise.
            prompt_embeds: text embeddings in place of `prompt`.
            negative_prompt_embeds: text embeddings in place of `negative_prompt`.
            output_type: "np", "pt", "pil" or "latent".
            return_dict: return a `TuneAVideoPipelineOutput` rather than a tuple.
            callback_on_step_end: called as `(pipeline, step, timestep, tensors)`; may return changed tensors.
            callback_on_step_end_tensor_inputs: names of the tensors that it receives.
            decode_chunk_size: frames that the VAE decodes at a time, which bounds the memory.
            conditioning_frames: what `controlnet` sees, one video for all prompts or one for each (see
                `tav_model.control.to_condition`); for several networks, a list with one for each network. By default no
                control. Without `latents`, the video has their number and size.
            controlnet_conditioning_scale: factor of the networks' residuals, one for all networks or one for each; 0 is
                no control.
            control_guidance_start: share of the steps after which the control begins, for all networks or for each.
            control_guidance_end: share of the steps after which it ends.
            guess_mode: for control without a prompt, see `tav_model.control.ControlSignal`.
            controlnet_chunk_size: frames that a control network sees at a time, which bounds the memory.
            sampler: "ddim", or "dpm-solver++", which needs fewer steps.
            num_inversion_steps: steps of the inversion that `latents` come from. Sampling then starts at the timestep where
                the inversion ended, for any number of steps; by default, at the scheduler's own first timestep.
            trajectory: of the inversion, `(n + 1) 1 c f h w`. Gives `latents` and `num_inversion_steps` where they are not
                given.
            layout_strength: how strong the source's layout is in the first latents, relative to the noise in them; see
                `tav_model.trajectory.Trajectory.start`. By default, as strong as the inversion left it.
            mean_match: share by which the mean of the first latents becomes that of noised latents, see there.
            deviation_match: the same for their deviation.
            strength: share of the steps that are sampled, the last ones. Sampling then starts from the trajectory's latents
                of a lower noise level, which have more of the source (as with the noised picture of SDEdit, arXiv
                2108.01073). Other shares are still of all steps. `latents`, where given, are those of the first sampled
                step.
            fresh_noise: share of fresh noise in the first latents, within the mask where there is one; see
                `tav_model.fresh_noise`. Not with a mask of words, which is known only after the first steps.
            fresh_noise_seed: of that noise, one for all prompts or one for each.
            source_prompt: describes the source; the prompt of the source branch. By default the empty prompt.
            source_prompt_embeds: embeddings `1 n c` in place of those of `source_prompt`.
            cross_attention_kwargs: see `tav_model.attention_control.AttentionControlOptions`.
            mask: where the video is generated, `f H W` or `b f H W` from 0 to 1 in pixels, with one frame for all or one
                for each: elsewhere the latents stay the source's. "words": where attention to the words is strong that
                differ from those of `source_prompt`. "difference": where the predictions for the prompt and for
                `source_prompt` differ.
            mask_inverted: generate outside of the mask instead.
            mask_start: share of the steps after which the mask applies; by default 0, and 0.2 for masks from words.
            mask_end: share of the steps after which it does not apply any more.
            mask_threshold: of masks from words, see `tav_model.blending.word_mask`.
            difference_threshold: of masks from differences, see `tav_model.difference_mask.difference_mask`.
            mask_feather: pixels around the mask in which the edit fades into the frames of `video`.
            video: the source's frames, `f H W 3` in uint8. With a `mask` in pixels or from differences, frames are exactly
                these beyond the feather.
            proximal_quantile: of proximal guidance, see `tav_model.guidance`; None: plain guidance.
            source_negative: share of the steps, from the first, in which `source_prompt` takes the place of the negative
                prompt. Guidance then leads from what the source shows to what the prompt asks for, and leaves alone what
                both have (as in negative-prompt inversion, Miyake et al., arXiv 2305.16807, where the share is 1).
            source_negative_weight: weight of the embedding of `source_prompt` in these steps; the rest is that of the negative
                prompt, so that what both prompts name is guided as well.
            attention_propagation: share of the steps, from the first, in which the outputs of spatio-temporal attention are
                averaged along the motion of the source, see `tav_model.propagation`.
            feature_propagation: the same for the outputs of complete transformer blocks.
            guidance_start: share of the steps after which guidance begins; before, the prediction is that for the prompt.
            guidance_end: share of the steps after which it ends.
            feature_reuse_interval: steps from one computation of the deep features to the next, see
                `tav_model.networks.feature_reuse`; 1: they are computed in each step.
            context_length: frames that the network sees at a time; longer clips are divided into windows, see
                `tav_model.windows`. None: it sees all frames. The inversion must have had the same windows.
            context_stride: frames from the start of a window to that of the next; by default half of a window.
            context_anchor: frame 0 comes before every window.
            context_weighting: "pyramid" or "uniform", of the predictions of windows that overlap.

        Raises:
            ValueError: arguments that contradict each other or the model.
            TavError: conditioning frames that do not fit the video.
        """
        control_signal = None
        if conditioning_frames is not None:
            control_signal = self.prepare_control(
                conditioning_frames,
                controlnet_conditioning_scale,
                control_guidance_start,
                control_guidance_end,
                guess_mode,
                controlnet_chunk_size,
            )
            if latents is None:
                f, h, w = control_signal.conditions[0].shape[2:]
                num_frames, height, width = num_frames or f, height or h, width or w

        # 1. Check inputs
        do_classifier_free_guidance = guidance_scale > 1.0
        options = AttentionControlOptions.from_kwargs(cross_attention_kwargs)
        source = None if trajectory is None else Trajectory(trajectory, self.scheduler)
        starts_from_source = source is not None and latents is None
        if source is not None:
            num_inversion_steps = num_inversion_steps or len(source.latents) - 1
            if latents is None:
                latents = source.start(layout_strength, None, mean_match, deviation_match)
        elif latents is None and strength < 1:
            raise ValueError("trajectory: needed for strength")
        self.check_inputs(
            prompt,
            height,
            width,
            num_frames,
            negative_prompt if do_classifier_free_guidance else None,
            generator,
            latents,
            prompt_embeds,
            negative_prompt_embeds if do_classifier_free_guidance else None,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        shares = {
            "mask_start": mask_start or 0,
            "mask_end": mask_end,
            "mask_threshold": mask_threshold,
            "strength": strength,
            "mean_match": mean_match,
            "deviation_match": deviation_match,
            "fresh_noise": fresh_noise,
            "proximal_quantile": proximal_quantile or 0,
            "source_negative": source_negative,
            "source_negative_weight": source_negative_weight,
            "attention_propagation": attention_propagation,
            "feature_propagation": feature_propagation,
            "guidance_start": guidance_start,
            "guidance_end": guidance_end,
        }
        self.check_source_inputs(
            options, source, num_inversion_steps, sampler, mask, video, output_type, layout_strength, shares
        )
        if not difference_threshold >= 0:
            raise ValueError(f"difference_threshold: {difference_threshold} must be 0 or more")
        if feature_reuse_interval < 1:
            raise ValueError(f"feature_reuse_interval: {feature_reuse_interval} must be 1 or more")
        window = None
        if context_length is not None:
            window = WindowOptions(context_length, context_stride, context_anchor, context_weighting)

        # 2. Encode prompts
        prompt_embeds, negative_prompt_embeds = self.encode_prompt(
            prompt, negative_prompt, do_classifier_free_guidance, prompt_embeds, negative_prompt_embeds
        )

        # 3. Prepare timesteps and latents
        first_timestep = inversion_timesteps(self.scheduler, num_inversion_steps)[-1] if num_inversion_steps else None
        schedule = SAMPLERS[sampler](self.scheduler, num_inference_steps, first_timestep)
        first_step = first_sampled_step(strength, num_inference_steps)
        if source is not None and starts_from_source and first_step:
            latents = source.start(layout_strength, schedule.timesteps[first_step], mean_match, deviation_match)
        device = self._execution_device
        latents = self.prepare_latents(len(prompt_embeds), num_frames, height, width, device, generator, latents)
        if control_signal is not None:
            control_signal.check_size(len(latents), *latents.shape[2:])
        if feature_reuse_interval > 1 and window is not None and not window.fits(latents.shape[2]):
            raise ValueError(
                f"feature_reuse_interval: {feature_reuse_interval} must be 1 where a clip is divided into windows: "
                "the features of all of them would be kept"
            )

        # 4. Prepare what is taken over from the source
        attention_control = AttentionControl(
            options,
            None if prompt is None else _texts(prompt, "prompt"),
            source_prompt,
            tokenizer=self.tokenizer,
            length=prompt_embeds.shape[1],
            num_steps=num_inference_steps,
            size=(latents.shape[2], latents.shape[3], latents.shape[4]),
            word_mask=_is(mask, WORDS),
        )
        compared = [name for name in ("source_negative", *PROPAGATED) if shares[name]]
        compared += ["mask"] if _is(mask, DIFFERENCE) else []
        if compared and source_prompt is None and source_prompt_embeds is None:
            raise ValueError(f"source_prompt: needed for {', '.join(compared)}")
        if source_prompt_embeds is None and (compared or attention_control.uses_source):
            source_prompt_embeds, _ = self.encode_prompt(source_prompt or [""], do_classifier_free_guidance=False)
        if source_prompt_embeds is not None:
            source_prompt_embeds = source_prompt_embeds.to(prompt_embeds)
        predict_source = partial(self._predict_source, schedule=schedule, control_signal=control_signal, window=window)
        texts = prompt_embeds if source_prompt_embeds is None else torch.cat([source_prompt_embeds, prompt_embeds])
        predict_each = partial(predict_source, text=texts)
        region = self.prepare_region(
            mask, latents, source, attention_control.word_maps, predict_each, difference_threshold
        )
        blending = None
        if source is not None and region is not None:
            if mask_start is None:
                mask_start = 0.0 if isinstance(region, torch.Tensor) else WORD_MASK_START
            blending = Blending(source, region, mask_inverted, mask_start, mask_end, mask_threshold)
        if fresh_noise:
            size = (latents.shape[-2], latents.shape[-1])
            where = latents.new_ones((1, *latents.shape[2:])) if blending is None else blending.current_mask(size)
            seeds = fresh_noise_seed if isinstance(fresh_noise_seed, Sequence) else [fresh_noise_seed] * len(latents)
            latents = with_fresh_noise(latents, where, fresh_noise, seeds)
        propagation = Propagation(attention_propagation, feature_propagation, num_inference_steps)
        if source is not None and source_prompt_embeds is not None and propagation.is_on:
            propagation.learn(self.unet, source, partial(predict_source, text=source_prompt_embeds))

        # 5. Denoise
        guided = guided_steps(guidance_start, guidance_end, num_inference_steps) if do_classifier_free_guidance else ()
        source_is_negative = guided_steps(0.0, source_negative, num_inference_steps)
        source_as_negative = None
        if source_prompt_embeds is not None:
            source_as_negative = source_prompt_embeds.expand_as(prompt_embeds)
            if source_negative_weight < 1 and negative_prompt_embeds is not None:
                source_as_negative = torch.lerp(negative_prompt_embeds, source_as_negative, source_negative_weight)
        predict, text_batches = FeatureReuse(self.unet, feature_reuse_interval), TextBatches()
        with (
            self.progress_bar(total=num_inference_steps - first_step) as progress,
            attention_control.attached(self.unet),
            propagation.attached(self.unet),
            text_projected_once(self.unet),
        ):
            timesteps = torch.tensor(schedule.timesteps, device=device)
            for step, timestep in enumerate(timesteps[first_step:], first_step):
                # [source, negative * b, prompt * b]; see `tav_model.attention_control`
                rows, embeds = [latents], [prompt_embeds]
                negative = source_as_negative if step in source_is_negative else negative_prompt_embeds
                if step in guided and negative is not None:
                    rows, embeds = [latents, *rows], [negative, *embeds]
                if source is not None and source_prompt_embeds is not None and attention_control.needs_source(step):
                    rows = [source.at(schedule.timesteps[step]).to(latents), *rows]
                    embeds = [source_prompt_embeds, *embeds]
                # A long clip is denoised window by window; see `tav_model.windows`.
                predict_window = partial(
                    self._predict,
                    predict=predict,
                    kinds=(len(rows), step in guided),
                    rows=rows,
                    text=text_batches(embeds),
                    timestep=timestep,
                    step=step,
                    num_inference_steps=num_inference_steps,
                    attention_control=attention_control,
                    propagation=propagation,
                    control_signal=control_signal,
                )
                noise_pred = predict_in_windows(predict_window, latents.shape[2], window)
                *others_pred, noise_pred = noise_pred.split([len(one) for one in rows])
                if step in guided:
                    noise_pred = guided_prediction(others_pred[-1], noise_pred, guidance_scale, proximal_quantile)
                del others_pred  # Those of a long clip are large.

                variance_noise = None
                if eta > 0:
                    variance_noise = randn_tensor(latents.shape, generator, device=latents.device, dtype=latents.dtype)
                latents = schedule.step(noise_pred, step, latents, eta, variance_noise)
                if blending is not None:
                    latents = blending.blend(latents, step, schedule.timesteps)

                # 6. Call back
                if callback_on_step_end is not None:
                    tensors: dict[str, Any] = {
                        "latents": latents,
                        "prompt_embeds": prompt_embeds,
                        "negative_prompt_embeds": negative_prompt_embeds,
                    }
                    selected = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    tensors |= callback_on_step_end(self, step, timestep, selected) or {}
                    latents, prompt_embeds, negative_prompt_embeds = tensors.values()
                progress.update()

        # 7. Decode, and paste into the source
        masks = None
        if blending is not None:
            masks = blending.current_mask((latents.shape[-2], latents.shape[-1])).expand(len(latents), -1, -1, -1)
        frames: Any = latents
        if output_type != "latent":
            decoded = self.decode_latents(latents, "pt", decode_chunk_size)
            if video is not None and masks is not None:
                parts = zip(decoded.split(1), self._pixel_masks(mask, masks, mask_inverted), strict=True)
                decoded = torch.cat([paste(part, video, generated, mask_feather) for part, generated in parts])
            frames = _as_output(decoded, output_type)
        self.maybe_free_model_hooks()
        return TuneAVideoPipelineOutput(frames=frames, masks=masks) if return_dict else (frames,)

    def _predict(
        self,
        window: Window | None,
        *,
        predict: FeatureReuse,
        kinds: tuple[int, bool],
        rows: Sequence[torch.Tensor],
        text: torch.Tensor,
        timestep: torch.Tensor,
        step: int,
        num_inference_steps: int,
        attention_control: AttentionControl,
        propagation: Propagation,
        control_signal: ControlSignal | None,
    ) -> torch.Tensor:
        """Return the network's prediction for the frames of a window, all rows in one batch."""
        sample = torch.cat([select(one, window) for one in rows]).to(self.unet.dtype)
        residuals: dict[str, Any] = {}
        if control_signal is not None:
            others = len(sample) - len(rows[-1])  # The source and the negative prompts.
            residuals = control_signal.residuals(
                sample, timestep, text, step, num_inference_steps, num_unconditional=others, window=window
            )
        attention_control.begin_step(step, len(sample), window)
        propagation.begin_step(step, len(sample), int(attention_control.needs_source(step)), window)
        return predict(sample, timestep, text, kinds, **residuals).float()

    def _predict_source(
        self,
        latents: torch.Tensor,
        timestep: int,
        *,
        text: torch.Tensor,
        schedule: DDIMSampler,
        control_signal: ControlSignal | None,
        window: WindowOptions | None,
        announce: Callable[[Window | None], None] = lambda window: None,
    ) -> torch.Tensor:
        """Return the network's predictions from the source's latents `1 c f h w`, for each of the texts `b n c`.

        `announce` is called before each pass of the network, with its frames (None: all).
        """
        timesteps = schedule.timesteps
        step = min(range(len(timesteps)), key=lambda i: abs(timesteps[i] - timestep))
        time = torch.tensor(timestep, device=text.device)

        def predict(window: Window | None) -> torch.Tensor:
            announce(window)
            sample = select(latents.to(text), window).expand(len(text), -1, -1, -1, -1)
            residuals: dict[str, Any] = {}
            if control_signal is not None:
                residuals = control_signal.residuals(sample, time, text, step, len(timesteps), window=window)
            return self.unet(sample, time, text, **residuals).sample.float()

        return predict_in_windows(predict, latents.shape[2], window)

    def check_inputs(
        self,
        prompt: str | Sequence[str] | None,
        height: int | None,
        width: int | None,
        num_frames: int | None,
        negative_prompt: str | Sequence[str] | None,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        prompt_embeds: torch.Tensor | None,
        negative_prompt_embeds: torch.Tensor | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: Sequence[str],
    ) -> None:
        """Check the arguments of `__call__`.

        Raises:
            ValueError: arguments that contradict each other or the model.
        """
        if output_type not in ("np", "pt", "pil", "latent"):
            raise ValueError(f"output_type: {output_type!r} must be np, pt, pil or latent")
        if unknown := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs: {sorted(unknown)} not in {self._callback_tensor_inputs}"
            )
        b = len(_texts(prompt, "prompt")) if prompt_embeds is None else len(prompt_embeds)
        if isinstance(generator, list) and len(generator) != b:
            raise ValueError(f"generator: {len(generator)} for {b} prompts")
        negatives: Sequence[Any] | torch.Tensor | None = negative_prompt_embeds
        if negatives is None and negative_prompt and not isinstance(negative_prompt, str):
            negatives = _texts(negative_prompt, "negative_prompt")
        if negatives is not None and len(negatives) != b:
            raise ValueError(f"negative_prompt: {len(negatives)} for {b} prompts")

        channels, factor = self.unet.config.in_channels, self.vae_scale_factor
        if latents is None:
            if num_frames is None:
                raise ValueError("num_frames is needed where no latents are given")
            if (height or 0) % factor or (width or 0) % factor:
                raise ValueError(f"height and width: {height} and {width} must be multiples of {factor}")
            return
        if latents.ndim != 5 or latents.shape[0] not in (1, b) or latents.shape[1] != channels:
            raise ValueError(f"latents: {tuple(latents.shape)} must be 1 or {b}, {channels}, f, h, w")
        requested = {"num_frames": num_frames, "height": height, "width": width}
        actual = (latents.shape[2], latents.shape[3] * factor, latents.shape[4] * factor)
        for (name, value), latents_value in zip(requested.items(), actual, strict=True):
            if value is not None and value != latents_value:
                raise ValueError(f"{name}: {value} asked for, but the latents have {latents_value}")

    def check_source_inputs(
        self,
        options: AttentionControlOptions,
        source: Trajectory | None,
        num_inversion_steps: int | None,
        sampler: str,
        mask: torch.Tensor | np.ndarray | str | None,
        video: np.ndarray | None,
        output_type: str,
        layout_strength: float | None,
        shares: Mapping[str, float],
    ) -> None:
        """Check the arguments of `__call__` that concern the source, and those that are shares.

        Raises:
            ValueError: arguments that contradict each other, or are no shares.
        """
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler: {sampler!r} must be one of {', '.join(SAMPLERS)}")
        if layout_strength is not None and not layout_strength >= 0:
            raise ValueError(f"layout_strength: {layout_strength} must be 0 or more")
        if isinstance(mask, str) and mask not in (WORDS, DIFFERENCE):
            raise ValueError(f"mask: {mask!r} must be {WORDS!r}, {DIFFERENCE!r}, or numbers")
        for name, share in shares.items():
            check_share(name, share)
        takes_over = {
            "layout_strength": layout_strength is not None,
            "mask": mask is not None,
            "edit_type": options.edit_type,
            "n_self_replace": options.n_self_replace,
            "n_residual_replace": options.n_residual_replace,
            "local_blend_words": options.local_blend_words,
            **{name: shares[name] for name in ("mean_match", "deviation_match", *PROPAGATED)},
        }
        needed = [name for name, wanted in takes_over.items() if wanted]
        if needed and source is None:
            raise ValueError(f"trajectory: needed for {', '.join(needed)}")
        if source is not None and num_inversion_steps != len(source.latents) - 1:
            raise ValueError(
                f"num_inversion_steps: {num_inversion_steps}, but the trajectory has {len(source.latents) - 1} steps"
            )
        if video is not None and (output_type == "latent" or mask is None or _is(mask, WORDS)):
            raise ValueError("video: needs a mask of pixels or from differences, and another output_type than latent")
        if shares["fresh_noise"] and (_is(mask, WORDS) or options.local_blend_words is not None):
            raise ValueError(
                f"fresh_noise: {shares['fresh_noise']} must be 0 with a mask of words, which is not known in advance"
            )

    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None,
        negative_prompt: str | Sequence[str] | None = None,
        do_classifier_free_guidance: bool = True,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the text embeddings of prompts and negative prompts, each `b n c` in the UNet's precision.

        Embeddings that are given are returned in place of those of the texts. Without guidance, the negative ones are
        returned as they were given.

        Raises:
            ValueError: texts that are not texts, or numbers of them that do not agree.
        """

        def embed(texts: list[str]) -> torch.Tensor:
            return encode_prompts(self.tokenizer, self.text_encoder, texts)

        device, dtype = self._execution_device, self.unet.dtype
        if prompt_embeds is None:
            prompt_embeds = embed(_texts(prompt, "prompt"))
        prompt_embeds = prompt_embeds.to(device, dtype)
        if not do_classifier_free_guidance:
            return prompt_embeds, negative_prompt_embeds
        if negative_prompt_embeds is None:
            negatives = negative_prompt or ""
            negatives = [negatives] * len(prompt_embeds) if isinstance(negatives, str) else negatives
            negative_prompt_embeds = embed(_texts(negatives, "negative_prompt"))
        negative_prompt_embeds = negative_prompt_embeds.to(device, dtype)
        if negative_prompt_embeds.shape != prompt_embeds.shape:
            raise ValueError(
                f"negative_prompt: embeddings of shape {tuple(negative_prompt_embeds.shape)} for prompts of "
                f"shape {tuple(prompt_embeds.shape)}"
            )
        return prompt_embeds, negative_prompt_embeds

    def prepare_latents(
        self,
        batch_size: int,
        num_frames: int | None,
        height: int | None,
        width: int | None,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the first latents, `b c f h w`: those that are given, or noise.

        They are in float32, and so is the trajectory, even where the network is in half precision.
        """
        if latents is not None:
            return latents.to(device, torch.float32).expand(batch_size, -1, -1, -1, -1)
        size = self.unet.config.sample_size
        default_height, default_width = (size, size) if isinstance(size, int) or size is None else size
        factor = self.vae_scale_factor
        shape = (
            batch_size,
            self.unet.config.in_channels,
            num_frames,
            height // factor if height else default_height or 64,
            width // factor if width else default_width or 64,
        )
        return randn_tensor(shape, generator, device=device, dtype=torch.float32) * self.scheduler.init_noise_sigma

    def prepare_control(
        self,
        conditioning_frames: Any,
        controlnet_conditioning_scale: float | Sequence[float] = 1.0,
        control_guidance_start: float | Sequence[float] = 0.0,
        control_guidance_end: float | Sequence[float] = 1.0,
        guess_mode: bool = False,
        controlnet_chunk_size: int = 16,
    ) -> ControlSignal:
        """Return the control signal of `conditioning_frames` under the pipeline's `controlnet`.

        Raises:
            ValueError: the pipeline has none, or arguments that do not fit it.
            TavError: the conditioning frames are no frames.
        """
        if self.controlnet is None:
            raise ValueError("conditioning_frames: the pipeline has no controlnet")
        # The networks of a `MultiControlNetModel` are called one by one, which does not trigger the hooks of offloading.
        self.controlnet.to(self._execution_device)
        return ControlSignal(
            self.controlnet,
            conditioning_frames,
            controlnet_conditioning_scale,
            control_guidance_start,
            control_guidance_end,
            guess_mode,
            controlnet_chunk_size,
        )

    def prepare_region(
        self,
        mask: torch.Tensor | np.ndarray | str | None,
        latents: torch.Tensor,
        source: Trajectory | None,
        word_maps: WordMaps | None,
        predict: Callable[[torch.Tensor, int], torch.Tensor],
        difference_threshold: float,
    ) -> torch.Tensor | WordMaps | None:
        """Return where the video is generated: a mask of latents, the maps of words, or None for everywhere.

        Args:
            mask: as for `__call__`.
            latents: the first latents, `b c f h w`.
            source: the trajectory of the inversion.
            word_maps: of `AttentionControl`, where it records them.
            predict: as for `tav_model.difference_mask.difference_mask`.
            difference_threshold: see there.

        Raises:
            ValueError: see `prepare_mask`.
        """
        if source is None or word_maps is not None:
            return word_maps
        if _is(mask, DIFFERENCE):
            return difference_mask(predict, source, difference_threshold)
        return None if mask is None else self.prepare_mask(mask, latents)

    def prepare_mask(self, mask: torch.Tensor | np.ndarray | str | None, latents: torch.Tensor) -> torch.Tensor:
        """Return a mask in pixels, `f H W` or `b f H W`, reduced to latents: `1 f h w` or `b f h w`.

        f is 1 for a mask that is the same in all frames, or their number.

        Raises:
            ValueError: a mask of another size than the video, or numbers that are not from 0 to 1.
        """
        pixels = torch.as_tensor(mask)
        if pixels.ndim == 3:
            pixels = pixels[None]
        b, _, f, h, w = latents.shape
        shape = (f, h * self.vae_scale_factor, w * self.vae_scale_factor)
        if pixels.ndim != 4 or pixels.shape[1:] not in (shape, (1, *shape[1:])) or len(pixels) not in (1, b):
            raise ValueError(f"mask: {tuple(pixels.shape)} must be {shape}, or {b} of them")
        reduced = []
        for part in pixels.split(16, dim=1):  # A long one is much larger in float32.
            numbers = part.to(latents.device, torch.float32)
            if not (numbers.min() >= 0 and numbers.max() <= 1):
                raise ValueError(f"mask: numbers from {numbers.min():g} to {numbers.max():g} must be from 0 to 1")
            reduced.append(latent_mask(numbers, self.vae_scale_factor))
        return torch.cat(reduced, dim=1).expand(-1, f, -1, -1)

    def _pixel_masks(
        self, mask: torch.Tensor | np.ndarray | str | None, masks: torch.Tensor, inverted: bool
    ) -> Iterator[np.ndarray]:
        """Yield where each video was generated, `f H W`: the mask that was given, or that of the latents `b f h w`."""
        if not isinstance(mask, torch.Tensor | np.ndarray):
            yield from pixel_masks(masks, self.vae_scale_factor)
            return
        given = torch.as_tensor(mask, dtype=torch.float32).cpu().numpy()
        b, f = masks.shape[:2]
        for one in np.broadcast_to(given, (b, f, *given.shape[-2:])):
            yield 1 - one if inverted else one

    def decode_latents(self, latents: torch.Tensor, output_type: str = "np", decode_chunk_size: int = 8) -> Any:
        """Return the frames of latents `b c f h w`: "np" `b f h w c`, "pt" `b c f h w`, or "pil", lists of images."""
        # `vae.decode` does not trigger the hooks of model offloading.
        self.vae.to(latents.device)
        return _as_output(decode_latents(self.vae, latents, decode_chunk_size), output_type)


def _is(mask: torch.Tensor | np.ndarray | str | None, kind: str) -> bool:
    """Return whether `mask` names this kind of mask."""
    return isinstance(mask, str) and mask == kind


def _as_output(video: torch.Tensor, output_type: str) -> Any:
    """Return decoded frames, `b c f h w`, in the form of `output_type`."""
    if output_type == "pt":
        return video
    if output_type == "np":
        return rearrange(video, "b c f h w -> b f h w c").numpy()
    return [[Image.fromarray(frame) for frame in to_frames(one)] for one in video]


def _texts(prompt: str | Sequence[str] | None, name: str) -> list[str]:
    """Return prompts as a list.

    Raises:
        ValueError: there is none, or something else than texts.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt or ())
    if not prompts or not all(isinstance(text, str) for text in prompts):
        raise ValueError(f"{name}: {prompt!r} must be a text or a list of texts")
    return prompts
