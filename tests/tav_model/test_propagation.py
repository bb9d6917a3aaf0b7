"""Features averaged along the motion of the source, against direct computations, and through the whole pipeline."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

from tav_model.networks.transformer import BasicTransformerBlock
from tav_model.propagation import KEY_FRAMES, NOISE_LEVEL, corresponding_positions, key_frames, propagate
from tav_model.trajectory import Trajectory
from tests.support.models import noise, pipeline, relative

STEPS = 3
FRAMES = 3
TRAJECTORY = noise(STEPS + 1, 1, 4, FRAMES, 8, 8)
ARGUMENTS = {"trajectory": TRAJECTORY, "num_inference_steps": STEPS, "source_prompt": "a man", "output_type": "latent"}
BOTH = {"attention_propagation": 1.0, "feature_propagation": 0.5}
INJECTION = {"cross_attention_kwargs": {"n_self_replace": 0.4, "self_replace_layers": "all"}}


@given(num_frames=st.integers(1, 200))
def test_key_frames_are_all_frames_or_spread_over_them(num_frames):
    keys = key_frames(num_frames)
    assert keys == sorted(set(keys))
    assert len(keys) == min(num_frames, KEY_FRAMES)
    assert 0 <= keys[0] <= num_frames - 1 - keys[-1] + 1 <= num_frames / len(keys)


@given(num_frames=st.integers(1, 10), n=st.integers(1, 12), seed=st.integers(0, 99))
def test_definition(num_frames, n, seed):
    features, tokens = (torch.randn(num_frames, n, 5, generator=torch.Generator().manual_seed(s)) for s in (seed, -1))
    positions = corresponding_positions(features)
    result = propagate(tokens, positions)
    keys = key_frames(num_frames)
    for frame in range(num_frames):
        for place in range(n):
            alike = [cosine_similarity(features[frame, place][None], features[key]).argmax() for key in keys]
            expected = torch.stack([tokens[key, match] for key, match in zip(keys, alike, strict=True)]).mean(0)
            torch.testing.assert_close(result[frame, place], expected)


def test_follows_what_moves():
    """An object that moves by one position in each frame has the mean of its tokens everywhere; so has the background."""
    features = torch.zeros(4, 6, 2)
    features[..., 0] = 1
    tokens = torch.zeros(4, 6, 1)
    for frame in range(4):
        features[frame, frame + 1] = torch.tensor([0.0, 1.0])
        tokens[frame, frame + 1] = frame
    result = propagate(tokens, corresponding_positions(features))
    assert [result[frame, frame + 1].item() for frame in range(4)] == [1.5] * 4
    assert result.sum() == 6


@pytest.mark.parametrize("others", [{}, INJECTION, {"guidance_scale": 1.0}], ids=["plain", "injection", "unguided"])
@pytest.mark.parametrize("shares", [(0.5, 0.0), (0.0, 0.5), (1.0, 0.5)], ids=["attention", "blocks", "both"])
def test_pipeline_propagates_outputs_in_its_share_of_the_steps(others, shares, monkeypatch):
    pipe, prompts = pipeline(), ["a dog", "a cat"]
    propagated = {"attention_propagation": shares[0], "feature_propagation": shares[1]}
    result = pipe(prompts, **ARGUMENTS, **others, **propagated).frames

    blocks = [module for module in pipe.unet.modules() if isinstance(module, BasicTransformerBlock)]
    positions = {}
    handles = [
        block.attn1.register_forward_hook(
            lambda _, inputs, __, block=block: positions.update({block: corresponding_positions(inputs[0])})
        )
        for block in blocks
    ]
    timestep = round(NOISE_LEVEL * pipe.scheduler.config.num_train_timesteps)
    with torch.no_grad():
        embeds, _ = pipe.encode_prompt("a man", do_classifier_free_guidance=False)
        pipe.unet(Trajectory(TRAJECTORY, pipe.scheduler).at(timestep), timestep, embeds)
    for handle in handles:
        handle.remove()

    step = 0

    def moved(block, tokens, share):
        if step >= share * STEPS:
            return tokens
        videos = list(tokens.unflatten(0, (-1, FRAMES)))
        with_source = "cross_attention_kwargs" in others and step < 0.4 * STEPS
        return torch.cat(videos[:with_source] + [propagate(video, positions[block]) for video in videos[with_source:]])

    def count(pipe, number, timestep, tensors):
        nonlocal step
        step = number + 1
        return {}

    for block in blocks:
        for module, share in zip((block.attn1, block), shares, strict=True):
            forward = module.forward
            monkeypatch.setattr(
                module,
                "forward",
                lambda *inputs, forward=forward, block=block, share=share, **more: moved(
                    block, forward(*inputs, **more), share
                ),
            )
    direct = pipe(prompts, **ARGUMENTS, **others, callback_on_step_end=count).frames
    assert relative(result, direct) < 1e-5
    monkeypatch.undo()
    assert relative(pipe(prompts, **ARGUMENTS, **others).frames, direct) > 1e-3


def test_off_is_bit_identical():
    pipe = pipeline()
    off = {"attention_propagation": 0.0, "feature_propagation": 0.0}
    assert torch.equal(pipe("a dog", **ARGUMENTS, **off).frames, pipe("a dog", **ARGUMENTS).frames)


def test_batches_agree():
    pipe = pipeline()
    together = pipe(["a dog", "a cat"], **ARGUMENTS, **INJECTION, **BOTH).frames
    for row, prompt in enumerate(["a dog", "a cat"]):
        alone = pipe(prompt, **ARGUMENTS, **INJECTION, **BOTH).frames
        assert relative(together[row : row + 1], alone) < 1e-5


def test_an_inversion_that_ends_at_less_noise_is_compared_there():
    trajectory = {"trajectory": TRAJECTORY[:2], "num_inference_steps": 1}
    video = pipeline()("a dog", **ARGUMENTS | trajectory, **BOTH).frames
    assert video.isfinite().all()


def test_windows():
    """A window that covers the clip changes nothing; shorter ones have correspondences of their own."""
    pipe = pipeline()
    whole = pipe("a dog", **ARGUMENTS, **BOTH).frames
    assert torch.equal(pipe("a dog", **ARGUMENTS, **BOTH, context_length=FRAMES).frames, whole)
    windows = {"context_length": 2, "context_stride": 1}
    moved = pipe("a dog", **ARGUMENTS, **BOTH, **windows).frames
    assert relative(moved, pipe("a dog", **ARGUMENTS, **windows).frames) > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source_prompt": "a man", "latents": noise(1, 4, 3, 8, 8)}, "trajectory: needed for attention_propagation"),
        ({"trajectory": TRAJECTORY}, "source_prompt: needed for attention_propagation"),
        (ARGUMENTS | {"feature_propagation": 1.5}, r"feature_propagation: 1.5 must be a number from 0 to 1"),
    ],
)
def test_invalid_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline()("a dog", **{"attention_propagation": 1.0, "num_inference_steps": STEPS} | arguments)
