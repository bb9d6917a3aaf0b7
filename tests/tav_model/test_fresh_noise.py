"""Fresh noise in the first latents: where it is, that it moves with the mask, and through the whole pipeline."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tav_model.fresh_noise import with_fresh_noise
from tests.support.models import noise, pipeline, relative

STEPS = 4
TRAJECTORY = noise(STEPS + 1, 1, 4, 3, 8, 8)
LEFT = np.zeros((3, 16, 16), np.float32)
LEFT[:, :, :6] = 1
WHOLE = torch.ones(1, 1, 1, 1)


def moments(latents):
    return latents.mean((2, 3, 4), keepdim=True), latents.std((2, 3, 4), keepdim=True, correction=0)


def drawn(latents, mask, seed=1):
    """The noise that is mixed in, `b c f h w`."""
    mean, deviation = moments(latents)
    return (with_fresh_noise(latents, mask, 1.0, [seed] * len(latents)) - mean) / deviation


@given(share=st.floats(0.01, 1), f=st.integers(1, 4), h=st.integers(2, 6), w=st.integers(2, 6), seed=st.integers(0, 9))
def test_latents_within_the_mask_are_mixed_with_noise(share, f, h, w, seed):
    latents = 0.5 + 2 * noise(2, 4, f, h, w, seed=seed)
    mask = (noise(2, f, h, w, seed=seed + 1) > 0).float()
    result = with_fresh_noise(latents, mask, share, [3, 4])
    outside = (mask == 0)[:, None].expand_as(latents)
    assert torch.equal(result[outside], latents[outside])
    fresh = torch.cat([drawn(latents[i : i + 1], mask[i : i + 1], seed=3 + i) for i in range(2)])
    mean, deviation = moments(latents)
    expected = mean + deviation * ((1 - share**2) ** 0.5 * (latents - mean) / deviation + share * fresh)
    torch.testing.assert_close(result[~outside], expected[~outside], rtol=1e-3, atol=1e-3)


@given(row=st.integers(1, 6), column=st.integers(1, 6), later=st.tuples(st.integers(1, 6), st.integers(1, 6)))
def test_noise_moves_with_the_mask(row, column, later):
    mask = torch.zeros(1, 2, 8, 8)
    for frame, (y, x) in enumerate(((row, column), later)):
        mask[0, frame, y - 1 : y + 2, x - 1 : x + 2] = 1
    video = drawn(noise(1, 4, 2, 8, 8), mask)[0]
    here, there = (video[:, frame, y - 1 : y + 2, x - 1 : x + 2] for frame, (y, x) in enumerate(((row, column), later)))
    torch.testing.assert_close(here, there)


def test_noise_is_white_and_still_where_everything_is_in_the_mask():
    video = drawn(noise(1, 4, 2, 64, 64), WHOLE)[0]
    torch.testing.assert_close(video[:, 0], video[:, 1])
    frame = video[:, 0]
    assert abs(float(frame.mean())) < 0.05 and abs(float(frame.std()) - 1) < 0.05
    neighbours = float((frame[:, :, 1:] * frame[:, :, :-1]).mean())
    assert abs(neighbours) < 0.05


def test_noise_depends_on_the_seed_alone():
    latents, mask = noise(2, 4, 6, 8, 8), (noise(1, 6, 8, 8, seed=2) > 0.5).float()
    together = with_fresh_noise(latents, mask, 0.7, [5, 6])
    for i, seed in enumerate((5, 6)):
        assert torch.equal(with_fresh_noise(latents[i : i + 1], mask, 0.7, [seed]), together[i : i + 1])
    assert not torch.equal(*(drawn(latents[:1], WHOLE, seed) for seed in (5, 6)))
    inside = mask[:, None, 2:].expand(1, 4, 4, 8, 8) > 0
    later = drawn(latents[:1, :, 2:], mask[:, 2:])[inside]
    torch.testing.assert_close(drawn(latents[:1], mask)[:, :, 2:][inside], later, rtol=1e-4, atol=1e-4)


def test_a_frame_without_mask_has_none():
    mask = torch.zeros(1, 2, 8, 8)
    mask[0, 0, 2:4, 2:4] = 1
    latents = noise(1, 4, 2, 8, 8)
    assert torch.equal(with_fresh_noise(latents, mask, 0.7, [1])[:, :, 1], latents[:, :, 1])


# Through the pipeline


@pytest.fixture(scope="module")
def pipe():
    return pipeline()


def edit(pipe, prompt="a dog", **kwargs):
    arguments = {"trajectory": TRAJECTORY, "num_inference_steps": STEPS, "output_type": "latent"}
    return pipe(prompt, **arguments | kwargs).frames


@pytest.mark.parametrize("inverted", [False, True])
def test_sampling_starts_from_latents_with_fresh_noise_in_the_mask(pipe, inverted):
    blended = {"mask": LEFT, "mask_inverted": inverted}
    mask = torch.zeros(1, 3, 8, 8)
    mask[..., :3] = 1
    start = with_fresh_noise(TRAJECTORY[-1], 1 - mask if inverted else mask, 0.6, [7])
    expected = edit(pipe, latents=start, **blended)
    assert torch.equal(edit(pipe, fresh_noise=0.6, fresh_noise_seed=7, **blended), expected)
    assert relative(expected, edit(pipe, **blended)) > 0.05
    assert torch.equal(edit(pipe, fresh_noise=0.0, **blended), edit(pipe, **blended))


def test_each_prompt_has_its_own_seed(pipe):
    both = edit(pipe, ["a dog", "a dog"], fresh_noise=0.5, fresh_noise_seed=[1, 2], mask=LEFT)
    assert relative(both[:1], edit(pipe, fresh_noise=0.5, fresh_noise_seed=1, mask=LEFT)) < 1e-5
    assert relative(both[1:], both[:1]) > 0.01


def test_fresh_noise_needs_a_mask_that_is_known(pipe):
    with pytest.raises(ValueError, match=r"fresh_noise: 0.5 must be 0 with a mask of words"):
        edit(pipe, fresh_noise=0.5, mask="words", source_prompt="a man")
    with pytest.raises(ValueError, match=r"fresh_noise: 1.5 must be a number from 0 to 1"):
        edit(pipe, fresh_noise=1.5)
