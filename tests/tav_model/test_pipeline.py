"""`TuneAVideoPipeline`: guidance, batches and noise, outputs, callbacks, saving and loading, and its errors."""

import contextlib
import io
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from tav_model import TuneAVideoPipeline, UNet3DConditionModel
from tav_model.text import encode_prompts
from tests.support.models import (
    CONTEXT_DIM,
    SCHEDULER,
    image_unet,
    image_vae,
    noise,
    pipeline,
    relative,
    scheduler,
    seeded,
    stable_diffusion_folder,
    video_unet,
)

QUICK = {"num_inference_steps": 3, "output_type": "latent"}
LATENTS = noise(1, 4, 3, 8, 8)
BETAS = {key: SCHEDULER[key] for key in ("beta_start", "beta_end", "beta_schedule")}


@pytest.fixture(scope="module")
def pipe():
    return pipeline()


# Sampling


def sampling_by_hand(pipe, prompt, negative, latents, steps, guidance):
    """Equation 12 of the DDIM paper at eta 0, with classifier-free guidance written out."""
    embeds, empty = (encode_prompts(pipe.tokenizer, pipe.text_encoder, [text]) for text in (prompt, negative))
    alphas = pipe.scheduler.alphas_cumprod.tolist()
    x = latents
    for i in reversed(range(steps)):
        t = i * (1000 // steps) + 1
        before = t - 1000 // steps
        a, a_before = alphas[t], alphas[before] if before >= 0 else alphas[0]
        with torch.no_grad():
            with_text, without = pipe.unet(x, t, embeds).sample, pipe.unet(x, t, empty).sample
        epsilon = without + guidance * (with_text - without)
        clean = (x - math.sqrt(1 - a) * epsilon) / math.sqrt(a)
        x = math.sqrt(a_before) * clean + math.sqrt(1 - a_before) * epsilon
    return x


@pytest.mark.parametrize(("guidance", "negative"), [(1.0, ""), (7.5, ""), (12.5, "rain")])
def test_sampling_is_ddim_with_guidance(pipe, guidance, negative):
    ours = pipe("a man", latents=LATENTS, guidance_scale=guidance, negative_prompt=negative, **QUICK).frames
    assert relative(ours, sampling_by_hand(pipe, "a man", negative, LATENTS, 3, guidance)) < 1e-4


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.5), (0.5, 1.0), (0.25, 0.75)])
def test_guidance_in_a_part_of_the_steps(pipe, start, end):
    """Steps outside of it are those of a sampling without guidance."""
    options = {"num_inference_steps": 4, "output_type": "latent"}
    expected, rows = LATENTS, []
    for step in range(4):
        kept = []

        def keep(pipe, i, timestep, tensors, at=step, kept=kept, start=expected):
            if i == at:
                kept.append(tensors["latents"])
            return {"latents": start} if i == at - 1 else {}

        scale = 7.5 if start <= step / 4 < end else 1.0
        pipe(
            "a cat",
            latents=expected if step == 0 else LATENTS,
            guidance_scale=scale,
            callback_on_step_end=keep,
            **options,
        )
        expected = kept[0]
    hook = pipe.unet.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    frames = pipe(
        "a cat", latents=LATENTS, guidance_scale=7.5, guidance_start=start, guidance_end=end, **options
    ).frames
    hook.remove()
    assert torch.equal(frames, expected)
    assert rows == [2 if start <= step / 4 < end else 1 for step in range(4)]


def test_without_guidance_the_network_runs_on_one_video(pipe):
    batches = []
    hook = pipe.unet.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    pipe("a man", latents=LATENTS, guidance_scale=1.0, **QUICK)
    pipe("a man", latents=LATENTS, guidance_scale=1.1, **QUICK)
    hook.remove()
    assert batches == [1, 1, 1, 2, 2, 2]


def test_negative_prompt_matters(pipe):
    plain, rain = (pipe("a man", latents=LATENTS, negative_prompt=text, **QUICK).frames for text in ("", "rain"))
    assert relative(rain, plain) > 1e-3


def test_no_negative_prompt_is_an_empty_one(pipe):
    empty, none = (pipe("a man", latents=LATENTS, negative_prompt=text, **QUICK).frames for text in ("", None))
    assert torch.equal(none, empty)


def test_embeddings_serve_as_prompts(pipe):
    by_text = pipe("a man", latents=LATENTS, negative_prompt="rain", **QUICK).frames
    embeds = {
        name: encode_prompts(pipe.tokenizer, pipe.text_encoder, [text])
        for name, text in (("prompt_embeds", "a man"), ("negative_prompt_embeds", "rain"))
    }
    assert torch.equal(pipe(**embeds, latents=LATENTS, **QUICK).frames, by_text)


def test_given_latents_are_left_as_they_were(pipe):
    latents = LATENTS.clone()
    pipe(["a man", "a dog"], latents=latents, **QUICK)
    assert torch.equal(latents, LATENTS)


# Batches


@pytest.mark.slow
@settings(max_examples=6)
@given(
    prompts=st.lists(st.text("abcdef ", min_size=1, max_size=6), min_size=2, max_size=3),
    negatives=st.lists(st.text("xyz", max_size=3), min_size=3, max_size=3),
)
def test_prompts_of_a_batch_share_a_latent_and_are_as_alone(prompts, negatives):
    pipe = pipeline()
    negatives = negatives[: len(prompts)]
    together = pipe(prompts, latents=LATENTS, negative_prompt=negatives, **QUICK).frames
    for i, (prompt, negative) in enumerate(zip(prompts, negatives, strict=True)):
        alone = pipe(prompt, latents=LATENTS, negative_prompt=negative, **QUICK).frames
        assert relative(together[i : i + 1], alone) < 1e-4


def test_a_latent_for_each_prompt(pipe):
    latents = noise(2, 4, 3, 8, 8)
    together = pipe(["a man", "a dog"], latents=latents, **QUICK).frames
    for i, prompt in enumerate(["a man", "a dog"]):
        assert relative(together[i : i + 1], pipe(prompt, latents=latents[i : i + 1], **QUICK).frames) < 1e-4


def test_random_start_is_standard_noise_of_the_asked_size(pipe):
    first = []
    hook = pipe.unet.register_forward_pre_hook(lambda _, inputs: first.append(inputs[0][:1]))
    pipe("a man", num_frames=5, height=64, width=48, generator=seeded(0), **QUICK)
    hook.remove()
    assert first[0].shape == (1, 4, 5, 32, 24)
    assert first[0].mean().abs() < 0.05 and abs(first[0].std() - 1) < 0.05


def test_random_start_has_the_base_models_size_by_default(pipe):
    assert pipe("a man", num_frames=2, generator=seeded(0), **QUICK).frames.shape == (1, 4, 2, 8, 8)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_noise_of_a_video_is_of_its_generator_whatever_the_batch(pipe, eta):
    def render(prompts, seeds):
        generators = [seeded(seed) for seed in seeds]
        return pipe(prompts, num_frames=2, generator=generators, eta=eta, **QUICK).frames

    together = render(["a man", "a dog", "snow"], [5, 6, 7])
    assert relative(together[1:2], render(["a dog"], [6])) < 1e-4
    assert relative(together[[2, 0]], render(["snow", "a man"], [7, 5])) < 1e-4
    assert relative(together[1:2], render(["a dog"], [7])) > 0.1


def test_same_generator_same_bits(pipe):
    one, two = (pipe("a man", num_frames=2, generator=seeded(3), eta=0.5, **QUICK).frames for _ in range(2))
    assert torch.equal(one, two)


# Outputs


def test_output_types_are_one_video(pipe):
    def render(kind):
        return pipe(["a man", "a dog"], latents=LATENTS, num_inference_steps=2, output_type=kind).frames

    array, tensor, images, latents = (render(kind) for kind in ("np", "pt", "pil", "latent"))
    assert latents.shape == (2, 4, 3, 8, 8)
    assert array.shape == (2, 3, 16, 16, 3) and array.dtype == np.float32
    assert array.min() >= 0 and array.max() <= 1
    assert np.array_equal(tensor.permute(0, 2, 3, 4, 1).numpy(), array)
    assert [len(video) for video in images] == [3, 3]
    for video, frames in zip(images, array, strict=True):
        assert np.array_equal(np.stack([np.asarray(image) for image in video]), (frames * 255).round().astype(np.uint8))


def test_return_dict_false_gives_a_tuple(pipe):
    (latents,) = pipe("a man", latents=LATENTS, return_dict=False, **QUICK)
    assert torch.equal(latents, pipe("a man", latents=LATENTS, **QUICK).frames)


def test_decoder_gets_no_more_frames_than_the_chunk(pipe, monkeypatch):
    counts = []
    decode = pipe.vae.decode
    monkeypatch.setattr(pipe.vae, "decode", lambda batch: counts.append(len(batch)) or decode(batch))
    pipe(["a man", "a dog"], latents=LATENTS, num_inference_steps=1, decode_chunk_size=4)
    assert counts == [4, 2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_renders_nearly_the_same_and_never_black(pipe, dtype):
    half = pipeline().to(dtype)
    arguments = {"latents": LATENTS, "num_inference_steps": 3, "guidance_scale": 3.0}
    exact, video = pipe("a man", **arguments).frames, half("a man", **arguments).frames
    assert np.abs(video - exact).mean() < 0.02
    assert video.std() > 0.5 * exact.std() > 0


# Callbacks and progress


def test_callback_is_told_every_step(pipe):
    told = []

    def callback(pipeline, step, timestep, tensors):
        told.append((step, int(timestep), sorted(tensors)))
        return {}

    pipe("a man", latents=LATENTS, callback_on_step_end=callback, **QUICK)
    assert told == [(0, 667, ["latents"]), (1, 334, ["latents"]), (2, 1, ["latents"])]


def test_callback_may_change_the_latents(pipe):
    result = pipe(
        "a man", latents=LATENTS, callback_on_step_end=lambda *_: {"latents": torch.zeros_like(LATENTS)}, **QUICK
    )
    assert not result.frames.any()


def test_callback_may_change_the_prompt(pipe):
    other = encode_prompts(pipe.tokenizer, pipe.text_encoder, ["a dog"])
    changed = pipe("a man", latents=LATENTS, callback_on_step_end=lambda *_: {"prompt_embeds": other}, **QUICK).frames
    assert relative(changed, pipe("a man", latents=LATENTS, **QUICK).frames) > 1e-4


def test_callback_sees_what_it_asks_for(pipe):
    told = []
    names = ("latents", "prompt_embeds", "negative_prompt_embeds")

    def callback(*arguments):
        told.append({name: tensor.shape for name, tensor in arguments[-1].items()})

    pipe(
        "a man",
        latents=LATENTS,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=names,
        num_inference_steps=1,
        output_type="latent",
    )
    assert told == [dict(zip(names, [(1, 4, 3, 8, 8), (1, 10, CONTEXT_DIM), (1, 10, CONTEXT_DIM)], strict=True))]


@pytest.mark.parametrize("shown", [True, False])
def test_progress_bar_can_be_switched_off(shown):
    pipe = pipeline()
    pipe.set_progress_bar_config(disable=not shown)
    with contextlib.redirect_stderr(io.StringIO()) as out:
        pipe("a man", latents=LATENTS, **QUICK)
    assert ("3/3" in out.getvalue()) == shown


# Saving and loading


def test_saved_pipeline_comes_back(tmp_path, pipe):
    pipe.save_pretrained(tmp_path)
    loaded = TuneAVideoPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded.unet, UNet3DConditionModel)
    ours, theirs = (one("a man", latents=LATENTS, num_inference_steps=3).frames for one in (pipe, loaded))
    assert np.abs(theirs - ours).max() < 1e-5


@pytest.mark.parametrize("kind", [PNDMScheduler, EulerDiscreteScheduler, DDIMScheduler])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_stable_diffusion_folder_with_any_scheduler_samples_by_ddim(tmp_path, kind, prediction):
    base = kind(**BETAS, steps_offset=1, timestep_spacing="trailing", prediction_type=prediction)
    folder = stable_diffusion_folder(tmp_path / "sd", base)
    pipe = TuneAVideoPipeline.from_pretrained(folder, unet=video_unet())
    assert type(pipe.scheduler) is DDIMScheduler
    kept = {"steps_offset": 1, "timestep_spacing": "trailing", "prediction_type": prediction, **BETAS}
    assert {name: pipe.scheduler.config[name] for name in kept} == kept
    assert not pipe.scheduler.config.clip_sample


def test_inflated_stable_diffusion_folder_renders(tmp_path):
    folder = stable_diffusion_folder(tmp_path / "sd", PNDMScheduler(**BETAS, skip_prk_steps=True))
    unet = UNet3DConditionModel.from_pretrained_2d(folder)
    pipe = TuneAVideoPipeline.from_pretrained(folder, unet=unet)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a man", latents=LATENTS, num_inference_steps=2).frames.std() > 0


def test_ddim_scheduler_is_taken_as_it_is():
    base = scheduler(timestep_spacing="trailing")
    assert pipeline(scheduler=base).scheduler is base


def test_timesteps_that_inversion_does_not_have_are_not_sampled():
    assert pipeline(scheduler=scheduler(timestep_spacing="linspace")).scheduler.config.timestep_spacing == "leading"


def test_latents_are_never_clipped(pipe):
    clipping = pipeline(scheduler=scheduler(clip_sample=True))
    far = 10 * LATENTS
    ours, theirs = (one("a man", latents=far, **QUICK).frames for one in (pipe, clipping))
    assert torch.equal(ours, theirs)


# Errors

ERRORS = {
    "no prompt": ({"prompt": None}, "prompt: None"),
    "no prompts": ({"prompt": []}, "prompt: "),
    "a number for a prompt": ({"prompt": [3]}, "prompt: "),
    "unknown output": ({"output_type": "gif"}, "output_type: 'gif' must be np, pt, pil or latent"),
    "unknown callback tensor": (
        {"callback_on_step_end_tensor_inputs": ["noise"]},
        "callback_on_step_end_tensor_inputs",
    ),
    "too many negatives": ({"negative_prompt": ["a", "b"]}, "negative_prompt: 2 for 1 prompts"),
    "an image for latents": ({"latents": LATENTS[:, :, 0]}, "latents: "),
    "latents of another model": ({"latents": LATENTS[:, :3]}, "latents: "),
    "latents for other prompts": ({"latents": LATENTS.repeat(2, 1, 1, 1, 1)}, "latents: "),
    "other frames than the latents": ({"num_frames": 4}, "num_frames: 4 asked for, but the latents have 3"),
    "another height than the latents": ({"height": 32}, "height: 32 asked for, but the latents have 16"),
    "another width than the latents": ({"width": 32}, "width: 32 asked for, but the latents have 16"),
    "no frames": ({"latents": None}, "num_frames is needed"),
    "an odd size": ({"latents": None, "num_frames": 2, "width": 17}, "height and width: .*multiples of 2"),
    "too many steps": ({"num_inference_steps": 1001}, "1001"),
    "chunks of nothing": ({"decode_chunk_size": 0}, "chunk_size: 0 must be at least 1"),
    "too few generators": (
        {"latents": None, "num_frames": 2, "prompt": ["a", "b", "c"], "generator": [seeded(0), seeded(1)]},
        "generator: 2 for 3 prompts",
    ),
    "too many generators": (
        {"latents": None, "num_frames": 2, "generator": [seeded(0), seeded(1)]},
        "generator: 2 for 1 prompts",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_arguments_that_contradict_each_other_are_named(pipe, case):
    arguments, message = ERRORS[case]
    with pytest.raises(ValueError, match=rf"(?s)\A.*{message}"):
        pipe(**{"prompt": "a man", "latents": LATENTS, "num_inference_steps": 1} | arguments)


def test_image_unet_is_refused_with_what_to_do():
    with pytest.raises(ValueError, match=r"\Aunet: .*from_pretrained_2d.*\Z"):
        pipeline(unet=image_unet())


def test_stable_diffusion_folder_alone_is_refused_with_what_to_do(tmp_path):
    folder = stable_diffusion_folder(tmp_path / "sd", scheduler())
    with pytest.raises(ValueError, match=r"\Aunet: .*from_pretrained_2d.*\Z"):
        TuneAVideoPipeline.from_pretrained(folder)


def test_size_of_the_vae_is_its_own():
    assert pipeline(vae=image_vae()).vae_scale_factor == 2
