"""Long edits window after window: held to the former window, resumed bit-identically, with masks and control."""

import pytest
import torch

from tav_model import WindowOptions, ddim_inversion
from tav_model.autoregressive import edit_autoregressively
from tav_model.text import encode_prompts
from tav_model.windows import Window, select
from tests.support.models import controlnet, noise, pipeline, relative, seeded

STEPS, FRAMES = 3, 7
OPTIONS = WindowOptions(3, 2)


@pytest.fixture(scope="module")
def pipe():
    return pipeline()


@pytest.fixture(scope="module")
def trajectory(pipe):
    text = encode_prompts(pipe.tokenizer, pipe.text_encoder, ["a man"])
    return ddim_inversion(pipe.unet, pipe.scheduler, 0.5 * noise(1, 4, FRAMES, 8, 8), text, STEPS, window=OPTIONS)


SETTINGS = {"num_inference_steps": STEPS, "guidance_scale": 4.0}


def parts_of(pipe, source, folder, options=OPTIONS, **arguments):
    return list(edit_autoregressively(pipe, "a dog", source[-1], options, folder, **SETTINGS | arguments))


def edit(*arguments, **options):
    return torch.cat([part.latents for part in parts_of(*arguments, **options)], dim=2)


def test_parts_are_the_clip_in_order(pipe, trajectory, tmp_path):
    parts = parts_of(pipe, trajectory, tmp_path)
    assert [(part.start, part.stop) for part in parts] == [(0, 3), (3, 5), (5, 7)]
    assert torch.cat([part.latents for part in parts], dim=2).shape == trajectory[-1].shape


def test_a_window_of_the_complete_clip_is_the_edit(pipe, trajectory, tmp_path):
    plain = pipe("a dog", latents=trajectory[-1], output_type="latent", **SETTINGS).frames
    assert torch.equal(edit(pipe, trajectory, tmp_path, WindowOptions(FRAMES)), plain)


def test_network_sees_a_window_with_the_states_of_the_former_one(pipe, trajectory, tmp_path):
    seen = []
    hook = pipe.unet.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    edit(pipe, trajectory, tmp_path)
    hook.remove()
    assert [sample.shape[2] for sample in seen] == [3] * STEPS + [4] * 2 * STEPS
    first, second, third = (seen[i * STEPS : (i + 1) * STEPS] for i in range(3))
    for step in range(STEPS):
        assert torch.equal(second[step][:, :, 0], first[step][:, :, 0])  # the anchor
        assert torch.equal(second[step][:, :, 1], first[step][:, :, 2])  # the overlap
        assert torch.equal(third[step][:, :, 0], first[step][:, :, 0])
        assert torch.equal(third[step][:, :, 1], second[step][:, :, 3])


def test_without_an_anchor(pipe, trajectory, tmp_path):
    seen = []
    hook = pipe.unet.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[2]))
    edit(pipe, trajectory, tmp_path, WindowOptions(3, 2, anchor=False))
    hook.remove()
    assert set(seen) == {3}


@pytest.mark.parametrize("stop_at", [1, 4, 5, 8])
def test_interrupted_edits_resume_at_the_last_finished_window(pipe, trajectory, tmp_path, stop_at):
    expected = edit(pipe, trajectory, tmp_path / "complete")
    calls = []

    def stop(*_):
        calls.append(1)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        edit(pipe, trajectory, tmp_path / "x", callback_on_step_end=stop)
    calls.clear()
    parts = parts_of(pipe, trajectory, tmp_path / "x", callback_on_step_end=lambda *_: calls.append(1) or {})
    finished = (stop_at - 1) // STEPS
    assert [part.resumed for part in parts] == [True] * finished + [False] * (3 - finished)
    assert len(calls) == (3 - finished) * STEPS
    assert torch.equal(torch.cat([part.latents for part in parts], dim=2), expected)


def test_masks_keep_the_source(pipe, trajectory, tmp_path):
    moving = torch.zeros(FRAMES, 16, 16)
    moving[:, :8] = 1
    frames = edit(pipe, trajectory, tmp_path / "moving", trajectory=trajectory, mask=moving, source_prompt="a man")
    assert relative(frames[..., 4:, :], trajectory[0][..., 4:, :]) < 1e-5
    assert relative(frames[..., :4, :], trajectory[0][..., :4, :]) > 1e-2
    still = edit(pipe, trajectory, tmp_path / "still", trajectory=trajectory, mask=moving[:1], source_prompt="a man")
    assert torch.equal(still, frames)
    of_words = parts_of(
        pipe, trajectory, tmp_path / "words", trajectory=trajectory, mask="words", source_prompt="a man"
    )
    assert [part.masks.shape[1] for part in of_words] == [3, 2, 2]


def test_control_of_each_window(trajectory, tmp_path):
    pipe = pipeline(controlnet=controlnet())
    conditions, seen = torch.rand(3, FRAMES, 16, 16, generator=seeded(0)), []
    hook = pipe.controlnet.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[3]))
    edit(pipe, trajectory, tmp_path, conditioning_frames=conditions, guidance_scale=1.0)
    hook.remove()
    for i, window in enumerate(OPTIONS.windows(FRAMES)):
        assert torch.equal(seen[i * STEPS], select(conditions[None], window)[0].transpose(0, 1))
    assert OPTIONS.windows(FRAMES)[-1] == Window(4, 7, anchored=True)
