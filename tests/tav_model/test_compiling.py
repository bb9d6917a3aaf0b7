"""A compiled network does the same as one that is not, in all that edits do with it."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from tav_model import ddim_inversion
from tav_model.compiling import compile_network
from tav_model.errors import TavError
from tav_model.text import encode_prompts
from tav_model.tuning import Tuner, TuningConfig
from tests.support.models import noise, pipeline, relative, scheduler, video_unet

STEPS = 3
FRAMES = (1, 4, 3, 8, 8)
# Plain edits, and those in which layers have hooks: maps of the source, its features, features of the former step.
OPTIONS: dict[str, dict[str, object]] = {
    "plain": {},
    "attention control": {
        "cross_attention_kwargs": {"edit_type": "replace", "n_cross_replace": 0.5, "n_self_replace": 0.7},
    },
    "features": {"cross_attention_kwargs": {"n_residual_replace": 0.7}},
    "propagation": {"attention_propagation": 0.7},
    "feature reuse": {"feature_reuse_interval": 2},
}

pytestmark = pytest.mark.slow


@pytest.fixture(params=["eager", pytest.param("inductor", marks=pytest.mark.long)])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Without code generation, which takes minutes, the graphs of the compiled network run as they are."""
    torch.compiler.reset()
    counters.clear()
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend=request.param))
    return request.param


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(options, id=name, marks=[pytest.mark.long] if name.startswith(("feature", "propagation")) else [])
        for name, options in OPTIONS.items()
    ],
)
def test_edits_and_inversions_are_the_same(backend: str, options: dict[str, object]) -> None:
    videos = []
    for compiled in (False, True):
        pipe = pipeline()
        if compiled:
            compile_network(pipe.unet, "cpu")
        text = encode_prompts(pipe.tokenizer, pipe.text_encoder, ["a man"])
        trajectory = ddim_inversion(pipe.unet, pipe.scheduler, 0.5 * noise(*FRAMES), text, STEPS)
        arguments = {"num_inference_steps": STEPS, "output_type": "latent", "guidance_scale": 3.0}
        if options.keys() & {"cross_attention_kwargs", "attention_propagation"}:
            arguments |= {"trajectory": trajectory, "source_prompt": "a man"}
        else:
            arguments |= {"latents": trajectory[-1]}
        videos.append(pipe("a dog", **arguments | options).frames)
    assert relative(videos[1], videos[0]) < 1e-5


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.long)])
def test_tuning_is_the_same(backend: str, checkpointing: bool) -> None:
    losses = []
    for compiled in (False, True):
        tuner = Tuner(video_unet(), scheduler(), TuningConfig(steps=3, gradient_checkpointing=checkpointing))
        if compiled:
            compile_network(tuner.unet, "cpu")
        latents = noise(*FRAMES)
        losses.append([tuner.step(latents, torch.full_like(latents, 0.1), noise(1, 10, 12)).loss for _ in range(3)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    # What is compiled is the network as a whole, with what its layers keep for the backward pass.
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(TavError, match="needs a C\\+\\+ compiler"):
        compile_network(nn.Linear(2, 2), "cpu")
