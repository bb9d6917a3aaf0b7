"""Tune: train the inflated UNet on one clip, with checkpoints outside of the results."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.model_loading import MODEL_LOADING
from tasks.stage_control import StageControl
from tav.config import AttentionParams, TuneParams, WindowParams
from tav.runtime.devices import deterministic_gradients, is_out_of_memory, release_memory, resolve_precision
from tav.runtime.progress import Progress
from tav_model.base_models import base_digest, load_part
from tav_model.digests import canonical_json, digest
from tav_model.errors import TavError
from tav_model.files import atomic_folder, read_json, write_json
from tav_model.tensors import load_tensors, read_metadata, read_shape

if TYPE_CHECKING:
    from tav_model.tuning import StepRecord
    from tav_model.windows import WindowOptions

logger = logging.getLogger(__name__)

# Beside the checkpoints: the base model that they were tuned from.
BASE_FILE = "base.json"


def tune(
    latents: Path,
    out: Path,
    *,
    base: str,
    base_name: str,
    attention: AttentionParams,
    params: TuneParams,
    seed: int,
    device: str,
    gradient_checkpointing: bool,
    compile: bool = False,
    deterministic: bool = True,
    checkpoints: Path,
    checkpoint_every: int,
    progress: Progress,
    control: StageControl | None = None,
    window: WindowParams | None = None,
) -> None:
    """Write `tuned.safetensors`, `tuned.json` and `loss.csv` into `out`.

    A run that was stopped resumes from the newest checkpoint in `checkpoints` with the same inputs and settings,
    bit-identical on the same device; the folder is emptied at the end. A run that runs out of memory resumes likewise,
    with gradient checkpointing from there on.

    Args:
        latents: the output of the stage `encode`.
        out: the folder to write; an existing one is replaced.
        base: the folder or hub id of the base model.
        base_name: its name in the parameters.
        attention: the section `attention` of params.yaml.
        params: the section `tune` of params.yaml.
        seed: of the first weights of the temporal attention, and of all draws.
        device: the device to compute on.
        gradient_checkpointing: recompute activations in the backward pass instead of keeping them.
        compile: compile the network.
        deterministic: on a GPU, make every run bit-identical.
        checkpoints: a folder for checkpoints, outside of the results.
        checkpoint_every: steps between two checkpoints.
        progress: counts the steps; its records are `tav_model.tuning.StepRecord`.
        control: what steers the predictions while the UNet is tuned.
        window: the section `window` of params.yaml; None: no windows.
    """
    import pandas as pd
    import torch

    from tav_model import UNet3DConditionModel
    from tav_model.checkpoints import Checkpoints
    from tav_model.tuning import StepRecord, Tuner, TuningConfig

    tensors, _ = load_tensors(latents / "latents.safetensors", device)
    text, _ = load_tensors(latents / "text.safetensors", device)
    precisions = {params.precision: resolve_precision(params.precision, device)}
    params = params.model_copy(update={"precision": precisions[params.precision]})
    settings = params.model_dump()
    clip, base_identity = digest(latents), base_digest(base)
    windows = _windows(latents, window)
    identity = _identity(clip, base_identity, attention, params, seed, control, windows)
    origin = {"base_model": base_name, "base_digest": base_identity, "precisions": precisions}
    write_json(checkpoints / BASE_FILE, origin)

    def on_step(record: StepRecord) -> None:
        progress.update(record=record, loss=record.loss)

    def on_resume(records: Sequence[StepRecord]) -> None:
        progress.resume_at(len(records), records)

    def attempt(checkpointing: bool) -> Tuner:
        with MODEL_LOADING:
            torch.manual_seed(seed)  # For the first weights of the temporal attention.
            unet = UNet3DConditionModel.from_pretrained_2d(
                base, attention=tuple(attention.spatial), temporal=attention.temporal
            ).to(device)
            scheduler = load_part(base, "scheduler")
        config = TuningConfig(**settings, seed=seed, gradient_checkpointing=checkpointing, window=windows)
        signal = control.signal(base, device, torch.float32) if control else None
        tuner = Tuner(unet, scheduler, config, signal)
        if compile:
            from tav_model.compiling import compile_network

            compile_network(tuner.unet, device)
        tuner.fit(
            tensors["mean"],
            tensors["deviation"],
            text["caption"],
            checkpoints=Checkpoints(checkpoints, identity, every=checkpoint_every),
            on_step=on_step,
            on_resume=on_resume,
        )
        return tuner

    with progress, deterministic_gradients(device) if deterministic else contextlib.nullcontext():
        tuner = None
        try:
            tuner = attempt(gradient_checkpointing)
        except Exception as error:
            if gradient_checkpointing or not is_out_of_memory(error):
                raise
        if tuner is None:  # Outside of the handler, which keeps the network that was too large alive.
            release_memory()
            logger.warning("out of memory: retrying with runtime.gradient_checkpointing: true")
            progress.resume_at(0)
            tuner = attempt(True)
    if tuner.is_flat:
        logger.info("the loss on held-out noise is flat: tuning ends after step %d", len(tuner.history))
    with atomic_folder(out) as folder:
        tuner.unet.save_tuned(
            folder,
            tuner.config.trainable,
            base_model=base_name,
            base_digest=base_identity,
            clip_digest=clip,
            steps=len(tuner.history),
            seed=seed,
            **({"held_out_loss": tuner.held_out} if tuner.held_out else {}),
            **({"window": asdict(windows)} if windows else {}),
        )
        columns = ["step", "loss", "learning_rate", "gradient_norm", "timestep"]
        pd.DataFrame(tuner.history, columns=StepRecord._fields)[columns].to_csv(folder / "loss.csv", index=False)
    shutil.rmtree(checkpoints, ignore_errors=True)


def resume_step(
    latents: Path,
    checkpoints: Path,
    *,
    base_name: str,
    attention: AttentionParams,
    params: TuneParams,
    seed: int,
    control: StageControl | None = None,
    window: WindowParams | None = None,
) -> int | None:
    """Return the step of the checkpoint that `tune` would resume from with the same arguments; None where it would begin.

    Nothing of the base model is read: it is assumed to be the one that was tuned, if it has the same name. An automatic
    precision is assumed to be what it was then.
    """
    if not (checkpoints / BASE_FILE).is_file() or not latents.is_dir():
        return None
    try:
        base = read_json(checkpoints / BASE_FILE)
        if base["base_model"] != base_name:
            return None
        precision = base.get("precisions", {}).get(params.precision, params.precision)
        params = params.model_copy(update={"precision": precision})
        windows = _windows(latents, window)
        identity = _identity(digest(latents), base["base_digest"], attention, params, seed, control, windows)
    except (TavError, OSError, LookupError, TypeError, AttributeError):
        return None  # Damaged, or gone since, because another process tunes.
    for path in sorted(checkpoints.glob("step-*.safetensors"), reverse=True):
        with contextlib.suppress(TavError, ValueError, AttributeError):  # The tuning passes over a damaged one, too.
            if json.loads(read_metadata(path).get("state", "{}")).get("identity") == identity:
                return int(path.stem.removeprefix("step-"))
    return None


def _windows(latents: Path, window: WindowParams | None) -> WindowOptions | None:
    """Return the windows of the clip; None where it is not divided."""
    if window is None or window.context_length is None:
        return None
    return window.options(read_shape(latents / "latents.safetensors", "mean")[2])


def _identity(
    clip: str,
    base_identity: str,
    attention: AttentionParams,
    params: TuneParams,
    seed: int,
    control: StageControl | None = None,
    windows: WindowOptions | None = None,
) -> str:
    """Return what a checkpoint belongs to: everything that the tuning depends on."""
    settings = [params.model_dump(), attention.model_dump(), seed]
    controlled = [control.identity] if control else []
    return digest(
        clip, base_identity, canonical_json([*settings, asdict(windows)] if windows else settings), *controlled
    )
