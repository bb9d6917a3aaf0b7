"""Windows over a long clip: where they are, how their predictions are averaged, and through inversion, sampling, tuning."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tav_model import ControlSignal, Tuner, TuningConfig, WindowOptions, ddim_inversion
from tav_model.attention_control import WordMaps
from tav_model.checkpoints import Checkpoints
from tav_model.text import encode_prompts
from tav_model.tuning import diffusion_loss
from tav_model.windows import Window, predict_in_windows, select
from tests.support.models import (
    CONTEXT_DIM,
    controlnet,
    noise,
    pipeline,
    relative,
    scheduler,
    seeded,
    t2i_adapter,
    video_unet,
)
from tests.support.stopped_tuning import stop_after

STEPS = 3
FRAMES = 5
LATENTS = noise(1, 4, FRAMES, 8, 8)
SMALL = {"context_length": 3, "context_stride": 1}
TEXT = noise(1, 7, CONTEXT_DIM, seed=2)

OPTIONS = st.integers(1, 20).flatmap(
    lambda length: st.builds(
        WindowOptions,
        st.just(length),
        st.integers(1, length),
        st.booleans(),
        st.sampled_from(["pyramid", "uniform"]),
    )
)


@pytest.fixture(scope="module")
def pipe():
    return pipeline()


# Positions and weights


@given(options=OPTIONS, num_frames=st.integers(1, 100))
def test_windows_cover_the_clip(options, num_frames):
    windows = options.windows(num_frames)
    assert windows[0].start == 0 and windows[-1].stop == num_frames
    assert {frame for window in windows for frame in range(window.start, window.stop)} == set(range(num_frames))
    assert all(len(window) == min(options.context_length, num_frames) for window in windows)
    starts = [window.start for window in windows]
    assert starts[:-1] == [i * options.context_stride for i in range(len(windows) - 1)]
    assert all(0 < after - before <= options.stride for before, after in pairwise(starts))
    assert [window.anchored for window in windows] == [options.anchor and start > 0 for start in starts]
    if options.fits(num_frames):
        assert windows == [Window(0, num_frames)]


def test_sixteen_frames_every_eight():
    starts = [window.start for window in WindowOptions(16).windows(45)]
    assert starts == [0, 8, 16, 24, 29]  # The last one ends with the clip.


def test_weights_are_a_pyramid():
    assert WindowOptions(5, 5).weights(5) == [1, 2, 3, 2, 1]
    assert WindowOptions(4, 4).weights(4) == [1, 2, 2, 1]
    assert WindowOptions(4, 4, weighting="uniform").weights(4) == [1] * 4


@given(options=OPTIONS, num_frames=st.integers(1, 40), seed=st.integers(0, 100))
def test_drawn_windows_are_in_the_clip(options, num_frames, seed):
    window = options.draw(num_frames, seeded(seed))
    assert 0 <= window.start < window.stop <= num_frames
    assert len(window) == min(options.context_length, num_frames)


def test_every_frame_is_drawn():
    generator = seeded(0)
    counts = torch.zeros(20)
    for _ in range(2000):
        window = WindowOptions(8).draw(20, generator)
        counts[window.start : window.stop] += 1
    assert counts.min() > 0.35 * counts.max()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "context_length: 0 must be at least 1"),
        ((4, 5), "context_stride: 5 must be from 1 to the context_length, 4"),
        ((4, 0), "context_stride: 0 must be from 1 to the context_length, 4"),
        ((4, 2, True, "gaussian"), "weighting: 'gaussian' must be one of pyramid, uniform"),
    ],
)
def test_options_that_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        WindowOptions(*arguments)


# The average


@settings(max_examples=30)
@given(options=OPTIONS, num_frames=st.integers(1, 40))
def test_average_is_that_of_direct_computation(options, num_frames):
    clip = noise(2, 1, num_frames, 1, 1).double()

    def predict(window):
        return select(clip, window).cumsum(dim=2)  # Each frame's result depends on the frames before it in the window.

    result = predict_in_windows(predict, num_frames, options)
    values = clip[:, 0, :, 0, 0].tolist()
    for row, of_video in zip(result[:, 0, :, 0, 0].tolist(), values, strict=True):
        sums, norms = [0.0] * num_frames, [0.0] * num_frames
        for window in options.windows(num_frames):
            total = of_video[0] if options.anchor and window.start > 0 else 0.0
            for i in range(window.start, window.stop):
                total += of_video[i]
                place, length = i - window.start, window.stop - window.start
                weight = min(place + 1, length - place) if options.weighting == "pyramid" else 1
                sums[i] += weight * total
                norms[i] += weight
        assert row == pytest.approx([a / b for a, b in zip(sums, norms, strict=True)], rel=1e-6, abs=1e-6)


def test_windows_of_the_complete_clip_change_nothing(pipe, monkeypatch):
    """Two windows, each of all frames: the averages of equal predictions."""
    plain = inverted(pipe)
    edit = edited(pipe, plain)
    monkeypatch.setattr(WindowOptions, "fits", lambda *_: False)
    monkeypatch.setattr(WindowOptions, "windows", lambda _, num_frames: [Window(0, num_frames)] * 2)
    assert relative(inverted(pipe, WindowOptions(**SMALL)), plain) < 1e-5
    assert relative(edited(pipe, plain, **SMALL), edit) < 1e-5


def test_clip_that_fits_keeps_its_bits(pipe):
    plain = inverted(pipe)
    assert torch.equal(inverted(pipe, WindowOptions(FRAMES)), plain)
    assert torch.equal(edited(pipe, plain, context_length=FRAMES), edited(pipe, plain))


def inverted(pipe, window=None, prompt="a man", **options):
    text = encode_prompts(pipe.tokenizer, pipe.text_encoder, [prompt])
    return ddim_inversion(pipe.unet, pipe.scheduler, 0.5 * LATENTS, text, STEPS, window=window, **options)


def edited(pipe, trajectory, prompt="a dog", **options):
    arguments = {"num_inference_steps": STEPS, "output_type": "latent", "guidance_scale": 7.5}
    return pipe(prompt, trajectory=trajectory, source_prompt="a man", **arguments | options).frames


# Inversion and sampling


def test_network_sees_a_window_at_a_time(pipe):
    seen = []
    hook = pipe.unet.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[:3:2])))
    trajectory = inverted(pipe, WindowOptions(**SMALL))
    assert seen == [(1, 3), (1, 4), (1, 4)] * STEPS  # The first window begins with the anchor anyway.
    seen.clear()
    edited(pipe, trajectory, **SMALL, context_anchor=False)
    hook.remove()
    assert seen == [(2, 3)] * 3 * STEPS


def test_sampling_leads_back_through_windows(pipe):
    """Guidance 1 under the inversion's prompt is its inverse, if both have the same windows."""
    trajectory = inverted(pipe, WindowOptions(**SMALL), iterations=40, tolerance=1e-7)
    back = edited(pipe, trajectory, "a man", guidance_scale=1.0, **SMALL)
    assert relative(back, trajectory[0]) < 1e-4
    assert relative(edited(pipe, trajectory, "a man", guidance_scale=1.0), trajectory[0]) > 1e-3


def test_feature_reuse_is_refused_with_windows(pipe):
    trajectory = inverted(pipe)
    with pytest.raises(ValueError, match="feature_reuse_interval: 2 must be 1 where a clip is divided into windows"):
        edited(pipe, trajectory, feature_reuse_interval=2, **SMALL)
    reused = edited(pipe, trajectory, feature_reuse_interval=2, context_length=FRAMES)
    assert torch.equal(reused, edited(pipe, trajectory, feature_reuse_interval=2))


INJECTIONS = {
    "attention": {"n_self_replace": 1.0, "self_replace_layers": "all"},
    "features": {"n_residual_replace": 1.0},
    "words": {"edit_type": "replace", "n_cross_replace": 1.0},
}


@pytest.mark.parametrize("kind", INJECTIONS)
def test_attention_control_within_windows(pipe, kind):
    trajectory = inverted(pipe, WindowOptions(**SMALL), iterations=40, tolerance=1e-7)
    options = {"guidance_scale": 1.0, "cross_attention_kwargs": INJECTIONS[kind], **SMALL}
    assert relative(edited(pipe, trajectory, "a man", **options), trajectory[0]) < 1e-4
    plain = edited(pipe, trajectory, guidance_scale=1.0, **SMALL)
    assert relative(edited(pipe, trajectory, **options), plain) > 1e-4


def test_masks_from_words_have_the_maps_of_all_windows():
    size, positions = (6, 2, 2), 4
    maps, expected = WordMaps([[1]], [[2]], size), torch.zeros(2, 6, positions)
    for window in WindowOptions(3, 2).windows(6):
        frames = [0] * window.anchored + list(range(window.start, window.stop))
        source, edit = (
            noise(1, 2, len(frames) * positions, 3, seed=window.start),
            noise(1, 2, len(frames) * positions, 3, seed=window.start + 50),
        )
        for start in range(0, len(frames) * positions, 5):  # Pieces that end within a frame.
            piece = slice(start, start + 5)
            maps.add(source[:, :, piece], edit[:, :, piece], (2, 2), start, window)
        for i in range(window.anchored, len(frames)):
            of_frame = slice(i * positions, (i + 1) * positions)
            expected[0, frames[i]] += source[0, :, of_frame, 1].mean(0)
            expected[1, frames[i]] += edit[0, :, of_frame, 2].mean(0)
    assert torch.allclose(maps.maps()[:, 0].flatten(2), expected, atol=1e-6)


def test_blending_with_windows_keeps_the_source(pipe):
    trajectory = inverted(pipe, WindowOptions(**SMALL))
    mask = torch.zeros(FRAMES, 16, 16)
    mask[:, :8] = 1
    frames = edited(pipe, trajectory, mask=mask, **SMALL)
    kept = frames[..., 4:, :]
    assert relative(kept, trajectory[0][..., 4:, :]) < 1e-5
    assert relative(frames[..., :4, :], trajectory[0][..., :4, :]) > 1e-2
    of_words = edited(pipe, trajectory, "a dog", mask="words", mask_start=0.0, **SMALL)
    assert of_words.shape == frames.shape


@pytest.mark.parametrize("network", [controlnet, t2i_adapter])
@pytest.mark.parametrize("window", [Window(0, 3), Window(2, 5, anchored=True)])
def test_control_of_a_window_is_that_of_its_frames(network, window):
    conditions = torch.rand(3, FRAMES, 16, 16, generator=seeded(1))
    part, whole = (ControlSignal(network(), frames) for frames in (select(conditions[None], window)[0], conditions))
    sample = select(LATENTS, window)
    with torch.no_grad():
        expected = part.residuals(sample, 500, TEXT, 0, STEPS)
        actual = whole.residuals(sample, 500, TEXT, 0, STEPS, window=window)
    assert actual.keys() == expected.keys() and actual
    for name, values in expected.items():
        for ours, theirs in zip(_list(actual[name]), _list(values), strict=True):
            assert torch.equal(ours, theirs)


def _list(value):
    return value if isinstance(value, list) else [value]


# Tuning


def tuner(**config):
    return Tuner(
        video_unet(),
        scheduler(),
        TuningConfig(**{"steps": 4, "learning_rate": 1e-3, "window": WindowOptions(2, 1)} | config),
    )


DEVIATION = 0.1 * LATENTS.abs()


def test_tuning_sees_windows():
    one, seen = tuner(), []
    hook = one.unet.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[2]))
    one.fit(LATENTS, DEVIATION, TEXT)
    hook.remove()
    assert set(seen) <= {2, 3} and 3 in seen


def test_tuning_a_clip_that_fits_keeps_its_bits():
    weights = []
    for window in (None, WindowOptions(FRAMES)):
        one = tuner(window=window)
        one.step(LATENTS, DEVIATION, TEXT)
        weights.append(torch.cat([value.detach().flatten() for value in one.parameters.values()]))
    assert torch.equal(*weights)


@torch.no_grad()
def test_loss_leaves_out_the_anchor():
    unet, window = video_unet(), Window(2, 5, anchored=True)
    latents, added, timesteps = select(LATENTS, window), noise(1, 4, 4, 8, 8, seed=3), torch.tensor([400])
    noisy = scheduler().add_noise(latents, added, timesteps)
    errors = (unet(noisy, timesteps, TEXT).sample - added)[:, :, 1:] ** 2
    loss = diffusion_loss(unet, scheduler(), latents, added, timesteps, TEXT, window=window)
    assert loss.item() == pytest.approx(errors.mean().item(), rel=1e-5)


def test_tuning_with_windows_resumes_bit_identically(tmp_path):
    complete = tuner()
    complete.fit(LATENTS, DEVIATION, TEXT)

    checkpoints = Checkpoints(tmp_path, "clip", every=10)
    stop_after(2, tuner(), (LATENTS, DEVIATION, TEXT), checkpoints)
    resumed = tuner()
    resumed.fit(LATENTS, DEVIATION, TEXT, checkpoints)
    assert resumed.history == complete.history
    for name, value in complete.parameters.items():
        assert torch.equal(resumed.parameters[name], value)
