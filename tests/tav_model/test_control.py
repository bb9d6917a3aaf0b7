"""Control signals: parity with diffusers' pipelines, what leaves no trace, batches, chunks, inversion, tuning, errors."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionAdapterPipeline, StableDiffusionControlNetPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tav_model import ControlSignal, TavError, Tuner, TuningConfig, UNet3DConditionModel, ddim_inversion
from tav_model.control import to_condition
from tav_model.tuning import diffusion_loss
from tests.support.models import (
    CONTEXT_DIM,
    controlnet,
    image_unet,
    image_vae,
    noise,
    pipeline,
    relative,
    scheduler,
    seeded,
    t2i_adapter,
    text_encoder,
    tokenizer,
    video_unet,
)

FRAMES = 5
LATENTS = noise(1, 4, FRAMES, 8, 8)
TEXT = noise(1, 7, CONTEXT_DIM)
QUICK = {"num_inference_steps": 4, "output_type": "latent"}


def condition(frames: int = FRAMES, side: int = 16, videos: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.rand((videos, 3, frames, side, side), generator=seeded(seed))


CONDITION = condition()
NETWORKS = {
    "controlnet": controlnet,
    "two controlnets": lambda: [controlnet(), controlnet(1)],
    "adapter": t2i_adapter,
    "controlnet and adapter": lambda: [controlnet(), t2i_adapter()],
    "pooled": lambda: controlnet(global_pool_conditions=True),
    "bgr": lambda: controlnet(controlnet_conditioning_channel_order="bgr"),
}


def conditions(network, **arguments):
    return [condition(seed=i, **arguments) for i in range(2)] if isinstance(network, list) else condition(**arguments)


@pytest.fixture(scope="module", params=NETWORKS)
def controlled(request):
    """A pipeline with a network, and what it sees."""
    network = NETWORKS[request.param]()
    return pipeline(controlnet=network), conditions(network)


# Parity with diffusers, on one frame


def diffusers_pipeline(kind, unet=None, **network):
    parts = {
        "vae": image_vae(),
        "text_encoder": text_encoder(),
        "tokenizer": tokenizer(),
        "unet": unet or image_unet(),
        "scheduler": scheduler(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    pipe = kind(**parts | network)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inflated(unet=None, **parts):
    return pipeline(unet=UNet3DConditionModel.from_unet2d(unet or image_unet()), **parts)


# A light adapter has one more level, as wide as its last.
ADAPTERS = {
    "full": (t2i_adapter, {}),
    "light": (
        lambda: t2i_adapter(channels=[8, 16], adapter_type="light_adapter"),
        {"block_out_channels": (8, 16, 16)},
    ),
}


SETTINGS = {
    "plain": {},
    "weak": {"controlnet_conditioning_scale": 0.4},
    "a part of the steps": {"control_guidance_start": 0.25, "control_guidance_end": 0.75},
    "guess mode": {"guess_mode": True, "controlnet_conditioning_scale": 0.8},
    "without guidance": {"guidance_scale": 1.0},
    "guess mode without guidance": {"guidance_scale": 1.0, "guess_mode": True},
}
PARITY = {"num_inference_steps": 4, "guidance_scale": 5.0, "negative_prompt": "rain", "output_type": "latent"}


@pytest.mark.parametrize(
    ("kind", "case"),
    [
        *(("controlnet", case) for case in SETTINGS),
        ("pooled", "plain"),
        ("pooled", "without guidance"),
        ("bgr", "plain"),
    ],
)
def test_one_controlnet_agrees_with_diffusers_on_one_frame(kind, case):
    network, arguments = NETWORKS[kind](), PARITY | SETTINGS[case]
    latents, picture = noise(1, 4, 8, 8), condition(1)
    theirs = diffusers_pipeline(StableDiffusionControlNetPipeline, controlnet=network)(
        "a man", image=picture[:, :, 0], latents=latents, **arguments
    ).images
    ours = inflated(controlnet=network)("a man", conditioning_frames=picture, latents=latents[:, :, None], **arguments)
    assert relative(ours.frames[:, :, 0], theirs) < 1e-4
    without = inflated()(
        "a man", latents=latents[:, :, None], **PARITY | {"guidance_scale": arguments["guidance_scale"]}
    )
    assert relative(ours.frames, without.frames) > 1e-2


def test_two_controlnets_agree_with_diffusers_on_one_frame():
    networks = [controlnet(), controlnet(1)]
    latents, pictures = noise(1, 4, 8, 8), [condition(1), condition(1, seed=1)]
    arguments = PARITY | {
        "controlnet_conditioning_scale": [0.5, 0.9],
        "control_guidance_start": [0.0, 0.5],
        "control_guidance_end": [0.5, 1.0],
    }
    theirs = diffusers_pipeline(StableDiffusionControlNetPipeline, controlnet=networks)(
        "a man", image=[picture[:, :, 0] for picture in pictures], latents=latents, **arguments
    ).images
    ours = inflated(controlnet=networks)(
        "a man", conditioning_frames=pictures, latents=latents[:, :, None], **arguments
    )
    assert relative(ours.frames[:, :, 0], theirs) < 1e-4


@pytest.mark.parametrize(("guidance", "scale"), [(5.0, 1.0), (1.0, 0.6)])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_agrees_with_diffusers_on_one_frame(kind, guidance, scale):
    make, shape = ADAPTERS[kind]
    network, arguments = make(), PARITY | {"guidance_scale": guidance}
    latents, picture = noise(1, 4, 8, 8), condition(1)
    theirs = diffusers_pipeline(StableDiffusionAdapterPipeline, image_unet(**shape), adapter=network)(
        "a man", image=picture[:, :, 0], latents=latents, adapter_conditioning_scale=scale, **arguments
    ).images
    ours = inflated(image_unet(**shape), controlnet=network)(
        "a man",
        conditioning_frames=picture,
        latents=latents[:, :, None],
        controlnet_conditioning_scale=scale,
        **arguments,
    )
    assert relative(ours.frames[:, :, 0], theirs) < 1e-4


def test_an_adapter_of_grey_pictures_sees_their_luminance():
    network = t2i_adapter(in_channels=1)
    array = (255 * CONDITION[0].permute(1, 2, 3, 0).numpy()).astype(np.uint8)
    grey = [Image.fromarray(frame).convert("L") for frame in array]
    expected = torch.from_numpy(np.stack(grey) / 255).float()
    assert (ControlSignal(network, array).conditions[0][0, 0] - expected).abs().max() < 1 / 255
    assert (
        pipeline(controlnet=network)("a man", latents=LATENTS, conditioning_frames=array, **QUICK)
        .frames.isfinite()
        .all()
    )


# What leaves no trace

NO_CONTROL = {
    "scale 0": {"controlnet_conditioning_scale": 0},
    "an interval between two steps": {
        "control_guidance_start": 0.3,
        "control_guidance_end": 0.45,
    },
}


@pytest.mark.parametrize("case", NO_CONTROL)
def test_no_control_keeps_the_bits(controlled, case):
    pipe, frames = controlled
    plain = pipe("a man", latents=LATENTS, **QUICK).frames
    ours = pipe("a man", latents=LATENTS, conditioning_frames=frames, **NO_CONTROL[case], **QUICK).frames
    assert torch.equal(ours, plain)


def test_a_network_without_frames_keeps_the_bits(controlled):
    ours, plain = (one("a man", latents=LATENTS, **QUICK).frames for one in (controlled[0], pipeline()))
    assert torch.equal(ours, plain)


@pytest.mark.parametrize(("start", "end", "at"), [(0.0, 0.5, [0, 1]), (0.5, 1.0, [2, 3]), (0.25, 0.8, [1, 2])])
def test_networks_run_in_their_interval_only(start, end, at):
    pipe, ran, step = pipeline(controlnet=controlnet()), [], []
    pipe.controlnet.register_forward_pre_hook(lambda *_: ran.append(len(step)))
    arguments = {"control_guidance_start": start, "control_guidance_end": end}
    pipe(
        "a man",
        latents=LATENTS,
        conditioning_frames=CONDITION,
        callback_on_step_end=lambda *_: step.append(1),
        **arguments,
        **QUICK,
    )
    assert ran == at


def test_outside_the_interval_the_latents_are_as_without():
    def until(**arguments):
        seen = []
        pipe = pipeline(controlnet=controlnet())
        pipe(
            "a man",
            latents=LATENTS,
            callback_on_step_end=lambda *values: seen.append(values[-1]["latents"]),
            **arguments,
            **QUICK,
        )
        return seen

    late = until(conditioning_frames=CONDITION, control_guidance_start=0.5)
    without = until()
    assert torch.equal(late[0], without[0]) and torch.equal(late[1], without[1])
    assert relative(late[2], without[2]) > 1e-3


# Frames, batches and chunks


@pytest.mark.parametrize("kind", ["pooled", "bgr"])
def test_a_condition_is_embedded_once_for_all_steps(kind):
    network = NETWORKS[kind]()
    sizes = []
    network.controlnet_cond_embedding.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    pipe = pipeline(controlnet=network)
    pipe(
        ["a man", "a dog"],
        latents=LATENTS,
        conditioning_frames=CONDITION,
        num_inference_steps=3,
        controlnet_chunk_size=2,
    )
    assert sum(sizes) == FRAMES and max(sizes) == 2
    assert not isinstance(network.controlnet_cond_embedding, torch.nn.Identity)


@settings(max_examples=8, deadline=None)
@given(
    chunk=st.integers(1, 12),
    frames=st.integers(1, 5),
    batch=st.integers(1, 2),
    kind=st.sampled_from(list(NETWORKS)),
    guess=st.booleans(),
)
def test_chunks_and_batches_agree(chunk, frames, batch, kind, guess):
    network = NETWORKS[kind]()
    seen, text = conditions(network, frames=frames), noise(batch, 7, CONTEXT_DIM)
    sample, timesteps = noise(batch, 4, frames, 8, 8), torch.tensor([700, 20][:batch])

    def flat(residuals):
        parts = []
        for value in residuals.values():
            parts += value if isinstance(value, list) else [value]
        return parts

    def run(chunk_size, videos):
        signal = ControlSignal(network, seen, guess_mode=guess, chunk_size=chunk_size)
        return flat(signal.residuals(sample[videos], timesteps[videos], text[videos], 0, 4))

    together = run(100, slice(None))
    for ours, theirs in zip(run(chunk, slice(None)), together, strict=True):
        assert relative(ours, theirs) < 1e-5
    for video in range(batch):
        for ours, theirs in zip(run(100, slice(video, video + 1)), together, strict=True):
            # An adapter's map is the same for all videos.
            assert relative(ours, theirs[video : video + 1] if len(theirs) > 1 else theirs) < 1e-5


def test_prompts_of_a_batch_share_a_condition(controlled):
    pipe, frames = controlled
    together = pipe(["a man", "a dog"], latents=LATENTS, conditioning_frames=frames, **QUICK).frames
    for i, prompt in enumerate(["a man", "a dog"]):
        alone = pipe(prompt, latents=LATENTS, conditioning_frames=frames, **QUICK).frames
        assert relative(together[i : i + 1], alone) < 1e-4


@pytest.mark.parametrize("kind", ["controlnet", "adapter"])
def test_a_condition_for_each_prompt(kind):
    pipe, seen = pipeline(controlnet=NETWORKS[kind]()), condition(videos=2)
    together = pipe(["a man", "a dog"], latents=LATENTS, conditioning_frames=seen, **QUICK).frames
    for i, prompt in enumerate(["a man", "a dog"]):
        alone = pipe(prompt, latents=LATENTS, conditioning_frames=seen[i : i + 1], **QUICK).frames
        assert relative(together[i : i + 1], alone) < 1e-4


@pytest.mark.parametrize("kind", ["controlnet", "adapter"])
def test_every_frame_follows_its_own_condition(kind):
    signal = ControlSignal(NETWORKS[kind](), CONDITION)
    changed = CONDITION.clone()
    changed[:, :, 3] = 1 - changed[:, :, 3]
    other = ControlSignal(NETWORKS[kind](), changed)
    ours, theirs = (one.residuals(LATENTS, 500, TEXT, 0, 4) for one in (signal, other))
    for name, value in ours.items():
        for one, two in zip(value, theirs[name], strict=True) if isinstance(value, list) else [(value, theirs[name])]:
            differ = (one != two).flatten(3).any(-1).any(1)[0]
            assert differ.tolist() == [False, False, False, True, False]


def test_random_start_has_the_size_of_the_condition():
    pipe = pipeline(controlnet=controlnet())
    frames = pipe("a man", conditioning_frames=condition(3, 24), generator=seeded(0), **QUICK).frames
    assert frames.shape == (1, 4, 3, 12, 12)


@pytest.mark.parametrize("kind", ["controlnet", "adapter"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_renders_nearly_the_same(kind, dtype):
    arguments = {"latents": LATENTS, "conditioning_frames": CONDITION, "guidance_scale": 3.0, "num_inference_steps": 3}
    exact = pipeline(controlnet=NETWORKS[kind]())("a man", **arguments).frames
    half = pipeline(controlnet=NETWORKS[kind]()).to(dtype)("a man", **arguments).frames
    assert np.abs(half - exact).mean() < 0.03


# Other numbers of latent channels


def test_latents_of_16_channels():
    unet = UNet3DConditionModel.from_unet2d(image_unet(in_channels=16, out_channels=16))
    pipe = pipeline(unet=unet, vae=image_vae(latent_channels=16), controlnet=controlnet(in_channels=16))
    video = pipe("a man", conditioning_frames=CONDITION, num_inference_steps=2, generator=seeded(0)).frames
    assert video.shape == (1, FRAMES, 16, 16, 3)


# Inversion


def test_inversion_without_effective_control_keeps_the_bits():
    plain = ddim_inversion(video_unet(), scheduler(), LATENTS, TEXT, 4)
    for arguments in (
        {"controlnet_conditioning_scale": 0},
        {"control_guidance_start": 0.3, "control_guidance_end": 0.4},
    ):
        control = ControlSignal(controlnet(), CONDITION, **arguments)
        assert torch.equal(ddim_inversion(video_unet(), scheduler(), LATENTS, TEXT, 4, control=control), plain)


def test_control_of_the_first_half_of_sampling_is_that_of_the_last_half_of_inversion():
    plain = ddim_inversion(video_unet(), scheduler(), LATENTS, TEXT, 4)
    control = ControlSignal(controlnet(), CONDITION, control_guidance_end=0.5)
    ours = ddim_inversion(video_unet(), scheduler(), LATENTS, TEXT, 4, control=control)
    assert torch.equal(ours[:3], plain[:3])
    assert relative(ours[3], plain[3]) > 1e-3


@pytest.mark.slow
def test_controlled_sampling_leads_back_from_controlled_inversion():
    pipe, steps = pipeline(controlnet=t2i_adapter()), 40
    text = noise(1, 7, CONTEXT_DIM)
    control = ControlSignal(pipe.controlnet, CONDITION)
    start = 0.3 * LATENTS
    inverted = ddim_inversion(pipe.unet, pipe.scheduler, start, text, steps, control=control)[-1]

    def back(**arguments):
        return pipe(
            prompt_embeds=text,
            latents=inverted,
            num_inference_steps=steps,
            guidance_scale=1.0,
            output_type="latent",
            **arguments,
        ).frames

    same = relative(back(conditioning_frames=CONDITION), start)
    assert same < 0.5 * relative(back(), start)


# Tuning


def test_loss_under_control_is_that_of_the_controlled_prediction():
    unet, base, network = video_unet(), scheduler(), controlnet()
    added, timesteps = noise(*LATENTS.shape, seed=1), torch.tensor([400])
    control = ControlSignal(network, CONDITION, 0.7)
    noisy = base.add_noise(LATENTS, added, timesteps)
    with torch.no_grad():
        frames = noisy[0].transpose(0, 1)
        down, mid = network(
            frames, 400, TEXT.expand(FRAMES, -1, -1), CONDITION[0].transpose(0, 1), 0.7, return_dict=False
        )
        prediction = unet(
            noisy,
            400,
            TEXT,
            down_block_additional_residuals=[one.transpose(0, 1)[None] for one in down],
            mid_block_additional_residual=mid.transpose(0, 1)[None],
        ).sample
        loss = diffusion_loss(unet, base, LATENTS, added, timesteps, TEXT, control)
    assert loss.item() == pytest.approx((prediction - added).square().mean().item(), rel=1e-5)


def test_loss_outside_the_interval_is_the_plain_one_for_each_video():
    unet, base = video_unet(), scheduler()
    latents, added, text = (noise(2, 4, FRAMES, 8, 8, seed=i) for i in range(2)), None, noise(2, 7, CONTEXT_DIM)
    latents, added = latents
    # The first half of the sampling steps: timesteps from 500 on.
    control = ControlSignal(controlnet(), CONDITION, control_guidance_end=0.5)

    def loss(timesteps, control):
        with torch.no_grad():
            return diffusion_loss(unet, base, latents, added, torch.tensor(timesteps), text, control).item()

    assert loss([499, 3], control) == loss([499, 3], None)
    assert loss([500, 3], control) != loss([500, 3], None)
    one = [
        diffusion_loss(unet, base, latents[i : i + 1], added[i : i + 1], torch.tensor([t]), text[i : i + 1], c).item()
        for i, t, c in ((0, 500, control), (1, 3, None))
    ]
    assert loss([500, 3], control) == pytest.approx(sum(one) / 2, rel=1e-5)


def test_tuning_under_control_trains_the_unet_and_not_the_network():
    def tuned(control):
        tuner = Tuner(video_unet(), scheduler(), TuningConfig(steps=2, learning_rate=1e-3), control)
        tuner.fit(LATENTS, torch.zeros_like(LATENTS), TEXT)
        return tuner

    network = controlnet()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    controlled, plain = tuned(ControlSignal(network, CONDITION)), tuned(None)
    off = tuned(ControlSignal(network, CONDITION, 0.0))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert controlled.history[0].loss != plain.history[0].loss
    assert off.history == plain.history
    assert all(torch.equal(off.parameters[name], value) for name, value in plain.parameters.items())


@pytest.mark.parametrize("network", [controlnet, t2i_adapter])
def test_tuning_in_half_precision_stays_in_half_precision(network):
    tuner = Tuner(video_unet(), scheduler(), TuningConfig(precision="bfloat16"), ControlSignal(network(), CONDITION))
    seen = []
    for block in tuner.unet.up_blocks:
        block.register_forward_pre_hook(lambda _, inputs: seen.extend([inputs[0].dtype, *(r.dtype for r in inputs[1])]))
    assert np.isfinite(tuner.step(LATENTS, torch.zeros_like(LATENTS), TEXT).loss)
    assert set(seen) == {torch.bfloat16}


# Saving


@pytest.mark.parametrize("kind", ["controlnet", "two controlnets", "adapter"])
def test_saved_pipeline_comes_back_with_its_network(tmp_path, kind):
    network = NETWORKS[kind]()
    pipe, seen = pipeline(controlnet=network), conditions(network)
    pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    ours, theirs = (one("a man", latents=LATENTS, conditioning_frames=seen, **QUICK).frames for one in (pipe, loaded))
    assert relative(theirs, ours) < 1e-5


# Conditions


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=10)
def test_all_forms_of_frames_are_one_condition(n, f, h, w):
    array = np.random.default_rng(0).integers(0, 256, (n, f, h, w, 3), np.uint8)
    expected = torch.from_numpy(array).permute(0, 4, 1, 2, 3).float() / 255
    assert torch.equal(to_condition(array), expected)
    assert torch.equal(to_condition(expected), expected)
    assert torch.allclose(to_condition(array.astype(np.float64) / 255), expected)
    assert torch.equal(to_condition(array[0]), expected[:1])
    assert torch.equal(to_condition(expected[0]), expected[:1])
    assert torch.equal(to_condition([Image.fromarray(frame) for frame in array[0]]), expected[:1])


WRONG_FRAMES = {
    "a word": ("canny", "str must be a tensor"),
    "one picture": (np.zeros((4, 4, 3)), r"\(4, 4, 3\) must be"),
    "grey frames": (np.zeros((2, 4, 4, 1)), r"\(2, 4, 4, 1\) must be"),
    "frames first": (torch.zeros(5, 3, 4, 4), r"\(5, 3, 4, 4\) must be"),
    "from -1 to 1": (torch.full((3, 2, 4, 4), -1.0), r"values from -1 to -1 must be in \[0, 1\]"),
    "up to 255": (np.full((2, 4, 4, 3), 255.0), r"values from 255 to 255 must be in \[0, 1\]"),
    "not a number": (torch.full((3, 2, 4, 4), float("nan")), "values from nan"),
    "none": (torch.zeros(3, 0, 4, 4), "has no pixels"),
    "other sizes": ([Image.new("RGB", (4, 4)), Image.new("RGB", (4, 5))], "images of different sizes"),
}


@pytest.mark.parametrize("case", WRONG_FRAMES)
def test_what_is_no_frames_is_named(case):
    frames, message = WRONG_FRAMES[case]
    with pytest.raises(TavError, match=rf"\Aconditioning_frames: .*{message}") as error:
        to_condition(frames)
    assert "\n" not in str(error.value)


ERRORS = {
    "too few frames": (
        {"conditioning_frames": condition(4)},
        "4 frames of 16x16 pixels, but the video has 5 frames of 16x16",
    ),
    "another size": (
        {"conditioning_frames": condition(side=32)},
        "5 frames of 32x32 pixels, but the video has 5 frames of 16",
    ),
    "of other videos": ({"conditioning_frames": condition(videos=3)}, "conditioning_frames: those of 3 videos, for 1"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_conditions_that_do_not_fit_the_video_are_named(controlled, case):
    pipe, frames = controlled
    arguments, message = ERRORS[case]
    if isinstance(frames, list):
        arguments = {"conditioning_frames": [arguments["conditioning_frames"]] * 2}
    with pytest.raises(TavError, match=message):
        pipe("a man", latents=LATENTS, **arguments, **QUICK)
    network = [*pipe.controlnet.nets] if isinstance(frames, list) else pipe.controlnet
    with pytest.raises(TavError, match=message):
        ddim_inversion(pipe.unet, pipe.scheduler, LATENTS, TEXT, 1, control=ControlSignal(network, **arguments))


ARGUMENTS = {
    "an empty interval": ({"control_guidance_start": 0.5, "control_guidance_end": 0.5}, "control_guidance_start: 0.5"),
    "before the start": ({"control_guidance_start": -0.1}, "control_guidance_start: -0.1"),
    "after the end": ({"control_guidance_end": 1.1}, "1.1 and must be at most 1"),
    "too many scales": (
        {"controlnet_conditioning_scale": [1.0, 0.5]},
        "controlnet_conditioning_scale: 2 for 1 networks",
    ),
    "a scale of nothing": (
        {"controlnet_conditioning_scale": float("nan")},
        "controlnet_conditioning_scale: nan must be",
    ),
    "no chunk": ({"controlnet_chunk_size": 0}, "chunk_size: 0 must be at least 1"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments_that_are_not_allowed_are_named(case):
    arguments, message = ARGUMENTS[case]
    with pytest.raises(ValueError, match=message):
        pipeline(controlnet=controlnet())("a man", latents=LATENTS, conditioning_frames=CONDITION, **arguments, **QUICK)


def test_frames_without_a_network_are_refused():
    with pytest.raises(ValueError, match="the pipeline has no controlnet"):
        pipeline()("a man", latents=LATENTS, conditioning_frames=CONDITION, **QUICK)


def test_frames_of_one_network_for_two_are_refused():
    with pytest.raises(ValueError, match="there are 2 networks"):
        ControlSignal([controlnet(), controlnet(1)], CONDITION)
    with pytest.raises(TavError, match="4 of one network, but 5 of another"):
        ControlSignal([controlnet(), controlnet(1)], [condition(5), condition(4)])
