"""Tunings that are stopped, to be resumed from their checkpoint."""

from __future__ import annotations

import pytest
import torch

from tav_model import Tuner
from tav_model.checkpoints import Checkpoints
from tav_model.tuning import StepRecord


class _Stop(BaseException):
    pass


def stop_after(step: int, tuner: Tuner, inputs: tuple[torch.Tensor, ...], checkpoints: Checkpoints) -> None:
    """Tune on `inputs`, as `Tuner.fit` takes them, and stop after a step as a user does, who interrupts."""

    def stop(record: StepRecord) -> None:
        if record.step == step:
            raise _Stop

    with pytest.raises(_Stop):
        tuner.fit(*inputs, checkpoints, on_step=stop)
