"""Masks and blending: in latents, in pixels, and through the whole pipeline."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tav_model.blending import Blending, feathered, latent_mask, paste, word_mask
from tav_model.latents import decode_latents, to_frames
from tav_model.sampling import CLEAN
from tav_model.trajectory import Trajectory
from tests.support.models import noise, pipeline, relative, scheduler

STEPS = 4
TRAJECTORY = noise(STEPS + 1, 1, 4, 3, 8, 8)
PIXELS = (3, 16, 16)
LEFT = np.zeros(PIXELS, np.float32)
LEFT[:, :, :6] = 1
BINARY = arrays.arrays(np.float32, PIXELS, elements=st.sampled_from([0.0, 1.0]))


@pytest.fixture(scope="module")
def pipe():
    return pipeline()


def edit(pipe, **kwargs):
    arguments = {"trajectory": TRAJECTORY, "num_inference_steps": STEPS, "output_type": "latent"}
    return pipe(**{"prompt": "a dog"} | arguments | kwargs).frames


@pytest.fixture(scope="module")
def unblended(pipe):
    return edit(pipe)


@pytest.fixture(scope="module")
def source_frames(pipe):
    """The decoded source."""
    return to_frames(decode_latents(pipe.vae, TRAJECTORY[0])[0])


# Latents


@given(mask=BINARY)
def test_a_latent_is_generated_where_any_of_its_pixels_is(mask):
    expected = mask.reshape(3, 4, 4, 4, 4).max(axis=(2, 4))
    assert np.array_equal(latent_mask(torch.from_numpy(mask), 4).numpy(), expected)


def test_grey_above_one_half_is_white():
    assert latent_mask(torch.tensor([[[0.5, 0.5], [0.5, 0.5]], [[0.0, 0.51], [0.0, 0.0]]]), 2).tolist() == [
        [[0]],
        [[1]],
    ]


@pytest.mark.parametrize("steps", [STEPS, 3, 6])
def test_empty_mask_gives_the_source_and_full_mask_the_unblended_edit(pipe, steps):
    empty, full = (edit(pipe, mask=np.full(PIXELS, x, np.float32), num_inference_steps=steps) for x in (0, 1))
    assert torch.equal(empty, TRAJECTORY[0])
    assert torch.equal(full, edit(pipe, num_inference_steps=steps))


def test_inverted_mask_swaps_them(pipe, unblended):
    empty, full = (edit(pipe, mask=np.full(PIXELS, x, np.float32), mask_inverted=True) for x in (0, 1))
    assert torch.equal(empty, unblended) and torch.equal(full, TRAJECTORY[0])


def test_mask_is_that_of_each_prompt(pipe):
    masks = torch.stack([torch.zeros(PIXELS), torch.ones(PIXELS)])
    prompts = ["a dog", "a cat"]
    together = edit(pipe, prompt=prompts, mask=masks)
    assert torch.equal(together[:1], TRAJECTORY[0]) and torch.equal(together[1:], edit(pipe, prompt=prompts)[1:])


@settings(max_examples=20)
@given(step=st.integers(0, STEPS - 1), start=st.floats(0, 1), end=st.floats(0, 1))
def test_blending_is_its_formula_within_its_steps(step, start, end):
    base = scheduler()
    timesteps = [751, 501, 251, 1]
    mask = (noise(2, 3, 8, 8) > 0).float()
    x = noise(2, 4, 3, 8, 8, seed=1)
    blended = Blending(Trajectory(TRAJECTORY, base), mask, start=start, end=end).blend(x, step, timesteps)
    source = TRAJECTORY[STEPS - 1 - step]
    expected = source + mask[:, None] * (x - source) if start * STEPS <= step < end * STEPS else x
    torch.testing.assert_close(blended, expected)


def test_blending_with_other_steps_takes_the_source_at_their_timesteps(pipe):
    states, timesteps = [], []

    def collect(_, __, timestep, tensors):
        states.append(tensors["latents"])
        timesteps.append(int(timestep))
        return {}

    edit(pipe, mask=np.zeros(PIXELS, np.float32), num_inference_steps=6, callback_on_step_end=collect)
    trajectory = Trajectory(TRAJECTORY, pipe.scheduler)
    for state, timestep in zip(states, [*timesteps[1:], CLEAN], strict=True):
        assert torch.equal(state, trajectory.at(timestep))


def test_blending_adds_no_row_to_the_batch(pipe):
    rows = []
    hook = pipe.unet.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    edit(pipe, mask=LEFT)
    hook.remove()
    assert rows == [2] * STEPS


# Words


def test_mask_of_words_is_where_attention_is_strong():
    maps = torch.zeros(2, 1, 2, 4, 4)
    maps[0, 0, 0, 0, 0] = 5.0  # The source's word, in the corner of the first frame.
    maps[1, 0, 1, 3, 3] = 0.01  # The edit's, in the opposite corner of the second: each frame has its own maximum.
    mask = word_mask(maps, (4, 4))
    expected = torch.zeros(1, 2, 4, 4)
    expected[0, 0, :2, :2] = expected[0, 1, 2:, 2:] = 1
    assert torch.equal(mask, expected)
    assert word_mask(maps, (8, 8)).shape == (1, 2, 8, 8)


def test_threshold_of_words():
    maps = torch.ones(2, 1, 1, 8, 8)
    maps[:, :, :, :, 4:] = 4
    assert word_mask(maps, (8, 8), 0.2).mean() == 1
    assert word_mask(maps, (8, 8), 0.3)[..., :3].sum() == 0


def test_words_mask_the_latents_and_the_mask_is_returned():
    pipe = pipeline()
    for name, parameter in pipe.unet.named_parameters():
        if name.endswith("attn2.to_q.weight"):
            parameter.data *= 100  # Otherwise, attention is nearly the same everywhere.
    arguments = {"trajectory": TRAJECTORY, "num_inference_steps": STEPS, "output_type": "latent"}
    output = pipe("a dog", source_prompt="a man", mask="words", mask_threshold=0.95, **arguments)
    assert output.masks.shape == (1, 3, 8, 8) and set(output.masks.unique().tolist()) == {0.0, 1.0}
    kept = (output.masks == 0)[:, None].expand_as(output.frames)
    assert torch.equal(output.frames[kept], TRAJECTORY[0][kept])
    by_name = pipe(
        "a dog",
        source_prompt="a man",
        cross_attention_kwargs={"local_blend_words": ["man", "dog"]},
        mask_threshold=0.95,
        **arguments,
    )
    assert torch.equal(by_name.frames, output.frames)


def test_no_mask_no_masks(pipe):
    assert pipe("a dog", latents=TRAJECTORY[-1], num_inference_steps=1, output_type="latent").masks is None


# Pixels


@settings(max_examples=30)
@given(mask=BINARY, feather=st.floats(0, 6, allow_subnormal=False))
def test_feather_falls_with_the_distance_to_the_mask(mask, feather):
    weights = feathered(mask, feather)
    for weight, inside in zip(weights, mask > 0.5, strict=True):
        points = np.argwhere(inside)
        for y in range(0, 16, 5):
            for x in range(0, 16, 5):
                distance = np.hypot(*(points - (y, x)).T).min() if len(points) else np.inf
                expected = float(distance == 0) if feather <= 1 else max(0.0, 1 - distance / feather)
                assert weight[y, x] == pytest.approx(expected, abs=1e-3)


@settings(max_examples=10)
@given(mask=BINARY, feather=st.sampled_from([0, 2, 8]), inverted=st.booleans())
def test_frames_are_exactly_the_source_beyond_the_feather(pipe, source_frames, mask, feather, inverted):
    arguments = {"trajectory": TRAJECTORY, "num_inference_steps": 1, "output_type": "pt", "mask": mask}
    arguments |= {"mask_feather": feather, "mask_inverted": inverted}
    plain = to_frames(pipe("a dog", **arguments).frames[0])
    frames = to_frames(pipe("a dog", video=source_frames, **arguments).frames[0])
    weights = feathered(1 - mask if inverted else mask, feather)
    assert np.array_equal(frames[weights == 0], source_frames[weights == 0])
    assert np.array_equal(frames[weights == 1], plain[weights == 1])


def test_empty_mask_gives_the_sources_frames(pipe, source_frames):
    video = pipe(
        "a dog", trajectory=TRAJECTORY, num_inference_steps=2, mask=np.zeros(PIXELS, np.float32), output_type="pt"
    )
    assert np.array_equal(to_frames(video.frames[0]), source_frames)
    white = np.full_like(source_frames, 255)
    arguments = {"trajectory": TRAJECTORY, "num_inference_steps": 1, "mask": np.zeros(PIXELS, np.float32)}
    (images,) = pipe("a dog", video=white, output_type="pil", **arguments).frames
    assert all(np.array_equal(np.asarray(image), frame) for image, frame in zip(images, white, strict=True))


@pytest.mark.parametrize("inverted", [False, True])
def test_each_video_is_pasted_with_its_own_mask(pipe, inverted):
    white = np.full((*PIXELS, 3), 255, np.uint8)
    masks = torch.stack([torch.as_tensor(LEFT), 1 - torch.as_tensor(LEFT)]).float()
    arguments = {"trajectory": TRAJECTORY, "num_inference_steps": 1, "output_type": "pt", "mask_inverted": inverted}
    both = pipe(["a dog", "a cat"], mask=masks, video=white, mask_feather=0, **arguments).frames
    for video, mask in zip(both, masks, strict=True):
        kept = mask > 0.5 if inverted else mask < 0.5
        assert (video[:, kept] == 1).all() and (video[:, ~kept] < 1).any()


def test_paste_mixes_within_the_feather():
    mask = np.zeros((1, 9, 9), np.float32)
    mask[0, 4, 4] = 1
    pasted = paste(torch.ones(1, 3, 1, 9, 9), np.zeros((1, 9, 9, 3), np.uint8), mask, 4)
    assert pasted[0, 0, 0, 4].tolist() == [0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25, 0]


# Errors

ERRORS = {
    "unknown mask": ({"mask": "sky"}, r"mask: 'sky' must be 'words'"),
    "mask of another size": ({"mask": np.zeros((3, 8, 8))}, r"mask: \(1, 3, 8, 8\) must be \(3, 16, 16\)"),
    "mask of other numbers": ({"mask": np.full(PIXELS, 255)}, r"mask: numbers from 255 to 255 must be from 0 to 1"),
    "masks for others": ({"mask": np.zeros((2, *PIXELS))}, r"mask: \(2, 3, 16, 16\) must be"),
    "share": ({"mask": LEFT, "mask_end": 2}, r"mask_end: 2 must be a number from 0 to 1"),
    "proximal": ({"proximal_quantile": 70}, r"proximal_quantile: 70 must be a number from 0 to 1"),
    "weight of the source": (
        {"source_negative_weight": -1},
        r"source_negative_weight: -1 must be a number from 0 to 1",
    ),
    "source as negative": ({"source_negative": 1.5}, r"source_negative: 1.5 must be a number from 0 to 1"),
    "no trajectory": ({"mask": LEFT, "trajectory": None, "latents": TRAJECTORY[-1]}, r"trajectory: needed for mask"),
    "video without mask": ({"video": np.zeros((*PIXELS, 3), np.uint8)}, r"video: needs a mask of pixels"),
    "other steps": ({"num_inversion_steps": 7}, r"num_inversion_steps: 7, but the trajectory has 4 steps"),
    "layout": ({"layout_strength": -1}, r"layout_strength: -1 must be 0 or more"),
    "sampler": ({"sampler": "euler"}, r"sampler: 'euler' must be one of ddim, dpm-solver\+\+"),
    "eta": ({"sampler": "dpm-solver++", "eta": 1.0}, r"eta: 1.0 must be 0"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_arguments_that_contradict_each_other_are_named(pipe, case):
    arguments, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        edit(pipe, **{"num_inference_steps": 1} | arguments)


@pytest.mark.parametrize("shape", [(3, 16, 8, 3), (2, 16, 16, 3), (3, 16, 16)])
def test_frames_of_another_size_are_refused(shape):
    with pytest.raises(ValueError, match=r"video: uint8 of shape"):
        paste(torch.ones(1, 3, *PIXELS), np.zeros(shape, np.uint8), LEFT)


# Noise levels


@pytest.mark.parametrize("sampler", ["ddim", "dpm-solver++"])
@pytest.mark.parametrize("steps", [2, 7])
def test_sampling_starts_at_the_last_timestep_of_the_inversion(pipe, sampler, steps):
    seen = []
    hook = pipe.unet.register_forward_pre_hook(lambda _, inputs: seen.append(int(inputs[1])))
    edit(pipe, num_inference_steps=steps, sampler=sampler)
    pipe("a dog", latents=TRAJECTORY[-1], num_inversion_steps=STEPS, num_inference_steps=steps, output_type="latent")
    hook.remove()
    assert len(seen) == 2 * steps and seen[0] == seen[steps] == 751 and seen[steps - 1] == seen[-1] == 1


def test_latents_of_the_trajectory_are_the_start(pipe, unblended):
    assert torch.equal(
        unblended, pipe("a dog", latents=TRAJECTORY[-1], num_inference_steps=STEPS, output_type="latent").frames
    )
    assert relative(edit(pipe, latents=noise(1, 4, 3, 8, 8, seed=9)), unblended) > 0.1
    assert relative(edit(pipe, layout_strength=1.0), unblended) > 0.1


def test_mask_of_one_frame_is_that_of_all(pipe, source_frames):
    still = LEFT[:1]
    assert np.array_equal(np.broadcast_to(still, LEFT.shape), LEFT)
    arguments = {"trajectory": TRAJECTORY, "num_inference_steps": 1, "output_type": "pt", "video": source_frames}
    frames = [pipe("a dog", mask=mask, source_prompt="a man", **arguments).frames for mask in (still, LEFT)]
    assert torch.equal(*frames)
