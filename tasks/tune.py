"""Tune: the trained weights of the inflated UNet on one clip, with checkpoints outside the results."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tav.runtime.devices import is_out_of_memory, release_memory
from tav.runtime.progress import Progress
from tav_model.base_models import base_digest, load_part
from tav_model.digests import canonical_json, digest
from tav_model.files import atomic_folder
from tav_model.tensors import load_tensors

if TYPE_CHECKING:
    from tav_model.tuning import StepRecord

logger = logging.getLogger(__name__)


def tune(
    latents: Path,
    out: Path,
    *,
    base: str,
    base_name: str,
    attention: Any,
    params: Any,
    seed: int,
    device: str,
    gradient_checkpointing: bool,
    checkpoints: Path,
    checkpoint_every: int,
    progress: Progress,
    on_step: Callable[[StepRecord], None] | None = None,
    on_resume: Callable[[Sequence[StepRecord]], None] | None = None,
) -> None:
    """Write `tuned.safetensors`, `tuned.json` and `loss.csv` into `out`.

    A run that was stopped goes on from the newest checkpoint in `checkpoints` with the same inputs and settings, to the
    same bits on the same device; the folder is emptied at the end. So does one that runs out of memory, with gradient
    checkpointing from there on.

    Args:
        on_step: told each step's record.
        on_resume: told those of the steps before an interruption, where there was one.
    """
    import pandas as pd
    import torch

    from tav_model import UNet3DConditionModel
    from tav_model.checkpoints import Checkpoints
    from tav_model.tuning import StepRecord, Tuner, TuningConfig

    tensors, _ = load_tensors(latents / "latents.safetensors", device)
    text, _ = load_tensors(latents / "text.safetensors", device)
    settings = params.model_dump()
    clip = digest(latents)
    identity = digest(clip, base_digest(base), canonical_json([settings, attention.model_dump(), seed]))

    def report(record: StepRecord) -> None:
        progress.update(loss=record.loss)
        if on_step is not None:
            on_step(record)

    def report_resumption(records: Sequence[StepRecord]) -> None:
        progress.go_on_at(len(records))
        if on_resume is not None:
            on_resume(records)

    def attempt(checkpointing: bool) -> Tuner:
        torch.manual_seed(seed)  # The first weights of the temporal attention.
        unet = UNet3DConditionModel.from_pretrained_2d(
            base, attention=tuple(attention.spatial), temporal=attention.temporal
        ).to(device)
        config = TuningConfig(**settings, seed=seed, gradient_checkpointing=checkpointing)
        tuner = Tuner(unet, load_part(base, "scheduler"), config)
        tuner.fit(
            tensors["mean"],
            tensors["deviation"],
            text["caption"],
            checkpoints=Checkpoints(checkpoints, identity, every=checkpoint_every),
            on_step=report,
            on_resume=report_resumption,
        )
        return tuner

    with progress:
        tuner = None
        try:
            tuner = attempt(gradient_checkpointing)
        except Exception as error:
            if gradient_checkpointing or not is_out_of_memory(error):
                raise
        if tuner is None:  # Out of the handler, which holds the network that was too large.
            release_memory()
            logger.warning("out of memory: going on with runtime.gradient_checkpointing: true")
            progress.go_on_at(0)
            tuner = attempt(True)
    with atomic_folder(out) as folder:
        tuner.unet.save_tuned(
            folder,
            tuner.config.trainable,
            base_model=base_name,
            base_digest=base_digest(base),
            clip_digest=clip,
            steps=tuner.config.steps,
            seed=seed,
        )
        columns = ["step", "loss", "learning_rate", "gradient_norm", "timestep"]
        pd.DataFrame(tuner.history, columns=StepRecord._fields)[columns].to_csv(folder / "loss.csv", index=False)
    shutil.rmtree(checkpoints, ignore_errors=True)
