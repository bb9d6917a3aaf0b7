"""NaN or infinity ends the tuning with one line; the checkpoints from before are complete and serve."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tav_model import TavError, Tuner, TuningConfig
from tav_model.checkpoints import Checkpoints
from tav_model.tensors import load_tensors
from tests.support.models import CONTEXT_DIM, noise, scheduler, video_unet

MEAN, DEVIATION = noise(1, 4, 2, 8, 8), 0.1 * noise(1, 4, 2, 8, 8, seed=1).abs()
CAPTION = noise(1, 7, CONTEXT_DIM, seed=2)
STEPS, FAULT = 6, 5  # with a checkpoint at each step


def fresh() -> Tuner:
    return Tuner(video_unet(), scheduler(), TuningConfig(steps=STEPS, learning_rate=1e-3))


def run(tuner: Tuner, checkpoints: Path) -> list:
    return tuner.fit(MEAN, DEVIATION, CAPTION, checkpoints=Checkpoints(checkpoints, "clip", every=1))


def kept(folder: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step-")) for path in folder.glob("step-*.safetensors"))


def spoil_loss(value: float):
    def inject(tuner: Tuner, patch: pytest.MonkeyPatch) -> None:
        from tav_model import tuning

        real = tuning.diffusion_loss

        def loss(*inputs):
            return real(*inputs) * value if len(tuner.history) == FAULT - 1 else real(*inputs)

        patch.setattr(tuning, "diffusion_loss", loss)

    return inject


def spoil_gradient(tuner: Tuner, patch: pytest.MonkeyPatch) -> None:
    parameter = next(iter(tuner.parameters.values()))
    parameter.register_hook(lambda gradient: gradient * math.nan if len(tuner.history) == FAULT - 1 else gradient)


def spoil_weights(tuner: Tuner, patch: pytest.MonkeyPatch) -> None:
    real = tuner.optimizer.step

    def step(*arguments):
        done = real(*arguments)
        if len(tuner.history) == FAULT - 1:
            with torch.no_grad():
                next(iter(tuner.parameters.values())).view(-1)[0] = math.nan
        return done

    patch.setattr(tuner.optimizer, "step", step)


FAULTS = {
    "NaN loss": (spoil_loss(math.nan), f"the loss of step {FAULT} is nan"),
    "infinite loss": (spoil_loss(math.inf), f"the loss of step {FAULT} is inf"),
    "exploding loss": (spoil_loss(1e6), rf"the loss of step {FAULT} is \d"),
    "NaN gradient": (spoil_gradient, f"the gradient of step {FAULT} is nan"),
    "NaN weight": (spoil_weights, f"the weights of step {FAULT} are not finite"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_last_good_checkpoint_stays(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inject, message = FAULTS[fault]
    tuner = fresh()
    with monkeypatch.context() as patch:
        inject(tuner, patch)
        with pytest.raises(TavError, match=f"tune: {message}.*tune.learning_rate") as raised:
            run(tuner, tmp_path / "faulty")
    assert "\n" not in str(raised.value)
    assert kept(tmp_path / "faulty") == [FAULT - 2, FAULT - 1]
    for path in (tmp_path / "faulty").glob("step-*.safetensors"):
        tensors = load_tensors(path)[0]
        assert all(torch.isfinite(tensor).all() for tensor in tensors.values())

    # From there, without the fault, bit-identical to a tuning that never had it.
    resumed, whole = fresh(), fresh()
    run(resumed, tmp_path / "faulty")
    run(whole, tmp_path / "whole")
    assert all(torch.equal(value, whole.parameters[name]) for name, value in resumed.parameters.items())


def test_a_weight_that_breaks_in_the_last_step_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuner = Tuner(video_unet(), scheduler(), TuningConfig(steps=FAULT, learning_rate=1e-3))
    spoil_weights(tuner, monkeypatch)
    with pytest.raises(TavError, match=f"the weights of step {FAULT} are not finite"):
        tuner.fit(MEAN, DEVIATION, CAPTION)
