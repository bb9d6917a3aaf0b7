"""Masks from differences: the definition, and what they keep through the whole pipeline."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from tav_model.blending import feathered, pixel_masks
from tav_model.difference_mask import DIFFERENCE_THRESHOLD, EVERYWHERE, WHOLE, difference_mask
from tav_model.latents import decode_latents, to_frames
from tav_model.trajectory import Trajectory
from tests.support.models import noise, pipeline, scheduler

STEPS = 4
TRAJECTORY = noise(STEPS + 1, 1, 4, 3, 8, 8)
LEVELS = (2, 3, 3)  # 0.6, 0.7 and 0.8 of four steps.
ARGUMENTS = {"trajectory": TRAJECTORY, "num_inference_steps": STEPS, "mask": "difference"}
CAPTION, PROMPT = "a man", "a dog"


@pytest.fixture(scope="module")
def pipe():
    """A network that heeds its text."""
    pipe = pipeline()
    for name, parameter in pipe.unet.named_parameters():
        if "attn2.to_v" in name or "attn2.to_out" in name:
            parameter.data *= 4
    return pipe


@pytest.fixture(scope="module")
def source_frames(pipe):
    return to_frames(decode_latents(pipe.vae, TRAJECTORY[0])[0])


@pytest.fixture(scope="module")
def differences(pipe):
    """The differences of the clean latents, computed directly, `1 f h w`."""
    with torch.no_grad():
        embeds, _ = pipe.encode_prompt([CAPTION, PROMPT], do_classifier_free_guidance=False)
        levels = []
        for level in LEVELS:
            timestep = Trajectory(TRAJECTORY, pipe.scheduler).timesteps[level]
            alpha = pipe.scheduler.alphas_cumprod[timestep]
            of_noise = [pipe.unet(TRAJECTORY[level], timestep, one[None]).sample for one in embeds]
            levels.append(((of_noise[1] - of_noise[0]) * ((1 - alpha) / alpha) ** 0.5).square().mean(dim=1).sqrt())
    return torch.stack(levels).mean(dim=0)


def edited(pipe, prompt=PROMPT, **arguments):
    return pipe(prompt, source_prompt=CAPTION, **{"output_type": "latent"} | ARGUMENTS | arguments)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@given(threshold=st.floats(0, 3))
def test_definition(kind, threshold):
    ddim = scheduler(prediction_type=kind)
    source = Trajectory(TRAJECTORY, ddim)
    outputs = noise(2, 4, 3, 8, 8)
    asked = []

    def predict(latents, timestep):
        asked.append(timestep)
        assert torch.equal(latents, source.at(timestep))
        return outputs

    mask = difference_mask(predict, source, threshold)
    assert asked == [source.timesteps[level] for level in LEVELS]
    # The clean latents are linear in the output, with the same factor for both.
    factors = []
    for timestep in asked:
        alpha = ddim.alphas_cumprod[timestep]
        factors.append(
            {"epsilon": ((1 - alpha) / alpha) ** 0.5, "v_prediction": (1 - alpha) ** 0.5, "sample": 1.0}[kind]
        )
    difference = (outputs[1] - outputs[0]).square().mean(0).sqrt() * sum(factors) / len(factors)
    lowest = max(threshold, 0.25 * difference.flatten().sort().values[round(0.95 * (3 * 8 * 8 - 1))].item())
    if all(((difference - value).abs() > 1e-5).all() for value in (lowest, threshold)):
        expected = (difference > lowest).float()[None]
        around = functional.max_pool2d(expected, 3, 1, 1)
        whole = around.mean() > WHOLE or (difference > threshold).float().mean() > EVERYWHERE
        assert torch.equal(mask, torch.ones_like(mask) if whole else expected)


@pytest.mark.parametrize("changed", [0.65, 0.75])
def test_a_mask_of_nearly_everything_is_one_of_everything(changed):
    source = Trajectory(noise(STEPS + 1, 1, 4, 3, 40, 40), scheduler())
    outputs = torch.zeros(3, 4, 3, 40, 40)
    # With the row around, it is the share that is compared.
    outputs[1, :, :, : round(changed * 40) - 1] = 5.0
    outputs[2, :, :, :10] = 5.0
    nearly, part = difference_mask(lambda *_: outputs, source)
    assert nearly.mean().item() == pytest.approx(1.0 if changed > WHOLE else changed - 1 / 40, abs=1e-6)
    assert part.mean().item() == pytest.approx(10 / 40, abs=1e-6)


def test_a_strong_change_raises_the_threshold():
    source = Trajectory(noise(STEPS + 1, 1, 4, 3, 40, 40), scheduler())
    outputs = torch.zeros(4, 4, 3, 40, 40)
    strong = outputs[2:, :, :, :, :4]
    outputs[1] = 0.1  # Everywhere a little: nothing is stronger, so that all of it is the change.
    outputs[2, :, :, :, :30] = 0.1
    outputs[3] = 0.1
    strong[:] = 10.0
    everywhere, local, light = difference_mask(lambda *_: outputs, source)
    assert everywhere.all()
    assert local[..., :4].all() and not local[..., 4:].any()
    assert light.all()  # What changes everywhere does so beside a stronger change, too.


def test_mask_and_what_it_keeps(pipe, differences):
    threshold = differences.quantile(0.98).item()
    output = edited(pipe, difference_threshold=threshold)
    above = (differences > threshold).float()
    assert torch.equal(output.masks, above)
    # Not all of it, or there is nothing to test.
    assert 0 < output.masks.mean() < WHOLE
    kept = (output.masks == 0)[:, None].expand_as(output.frames)
    assert torch.equal(output.frames[kept], TRAJECTORY[0][kept])
    assert not torch.equal(output.frames[~kept], TRAJECTORY[0][~kept])
    same = edited(pipe, mask=pixel_masks(output.masks, 2))
    assert torch.equal(same.frames, output.frames)


def test_frames_are_exactly_the_source_beyond_the_feather(pipe, differences, source_frames):
    threshold = differences.quantile(0.98).item()
    white = np.full_like(source_frames, 255)
    output = edited(
        pipe, difference_threshold=threshold, video=white, mask_feather=2, output_type="pt", num_inference_steps=1
    )
    weights = feathered(pixel_masks(output.masks, 2)[0], 2)
    assert 0 < (weights == 0).mean() < 1
    assert (to_frames(output.frames[0])[weights == 0] == 255).all()
    assert (to_frames(output.frames[0])[weights == 1] < 255).any()


def test_the_caption_changes_nothing_and_everything_is_everything(pipe):
    output = edited(pipe, [CAPTION, PROMPT])
    assert output.masks.shape == (2, 3, 8, 8)
    assert not output.masks[0].any()
    assert torch.equal(output.frames[0], TRAJECTORY[0][0])
    all_of_it = edited(pipe, difference_threshold=0.0)
    unmasked = edited(pipe, mask=None)
    assert all_of_it.masks.all() and torch.equal(all_of_it.frames, unmasked.frames)
    assert DIFFERENCE_THRESHOLD > 0


def test_prompts_do_not_depend_on_one_another(pipe, differences):
    threshold = differences.quantile(0.9).item()
    both = edited(pipe, ["a cat", PROMPT], difference_threshold=threshold)
    alone = edited(pipe, difference_threshold=threshold)
    assert torch.equal(both.masks[1:], alone.masks)


def test_in_windows(pipe, differences):
    threshold = differences.quantile(0.9).item()
    whole = edited(pipe, difference_threshold=threshold)
    fitting = edited(pipe, difference_threshold=threshold, context_length=3)
    assert torch.equal(fitting.frames, whole.frames)
    divided = edited(pipe, difference_threshold=threshold, context_length=2, context_stride=1)
    assert divided.masks.shape == whole.masks.shape and 0 < divided.masks.mean() < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source_prompt": None}, "source_prompt: needed for mask"),
        ({"difference_threshold": -1.0}, "difference_threshold: -1.0 must be 0 or more"),
        ({"trajectory": None, "latents": TRAJECTORY[-1]}, "trajectory: needed for mask"),
        ({"video": np.zeros((3, 16, 16, 3), np.uint8)}, "another output_type than latent"),
    ],
)
def test_errors(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(PROMPT, **{"source_prompt": CAPTION, "output_type": "latent"} | ARGUMENTS | arguments)
