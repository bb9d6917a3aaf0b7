"""Invert: DDIM inversion, from the clip's latents to the noise that every edit starts from."""

from __future__ import annotations

import logging
from pathlib import Path

from tasks.model_loading import MODEL_LOADING
from tasks.stage_control import StageControl
from tav.config import AttentionParams, InvertParams, WindowParams
from tav.runtime.devices import resolve_precision
from tav.runtime.progress import Progress
from tav_model.base_models import load_part, load_tuned_unet
from tav_model.digests import digest
from tav_model.errors import TavError
from tav_model.files import atomic_folder
from tav_model.tensors import StoredTensor, TensorWriter, load_tensors, read_metadata, save_tensors

logger = logging.getLogger(__name__)


def invert(
    latents: Path,
    tuned: Path,
    out: Path,
    *,
    base: str,
    attention: AttentionParams,
    params: InvertParams,
    device: str,
    progress: Progress,
    control: StageControl | None = None,
    window: WindowParams | None = None,
    compile: bool = False,
) -> None:
    """Write `inverted.safetensors` and `trajectory.safetensors`.

    The first has `latents`, the last point of the trajectory, `1 c f h w` in float32; the second `trajectory`, from the clean
    latents to these, `(steps + 1) 1 c f h w`. `window` is the section of params.yaml; None: no windows.

    `control` steers the predictions, as it does in the edits. `compile` compiles the network.

    Raises:
        TavError: the weights were tuned on another clip, or the inverted latents are not finite.
    """
    import torch

    from tav_model.inversion import inversion_states
    from tav_model.networks.text_projections import text_projected_once
    from tav_model.text import encode_prompts

    dtype = getattr(torch, resolve_precision(params.precision, device))
    with MODEL_LOADING:
        unet, info = load_tuned_unet(base, tuned, attention.spatial, attention.temporal, device, dtype)
    if compile:
        from tav_model.compiling import compile_network

        compile_network(unet, device)
    if info.get("clip_digest") != digest(latents):
        raise TavError(f"{tuned}: tuned on other latents than {latents}; tune again (dvc repro)")
    metadata = read_metadata(latents / "latents.safetensors")
    clip = StoredTensor(latents / "latents.safetensors", "mean")[:].to(device)
    if params.prompt:
        with MODEL_LOADING:
            text_encoder, tokenizer = load_part(base, "text_encoder").to(device), load_part(base, "tokenizer")
        text = encode_prompts(tokenizer, text_encoder, [params.prompt])
    else:
        text = load_tensors(latents / "text.safetensors", device)[0]["empty"]
    scheduler = load_part(base, "scheduler")
    signal = control.signal(base, device, dtype) if control else None
    windows = window.options(clip.shape[2]) if window is not None else None
    kept = getattr(torch, params.trajectory)
    described = {
        "stage": "invert",
        "scale": metadata["scale"],
        "fps": metadata["fps"],
        "steps": str(params.steps),
        "prompt": params.prompt,
        "latents": digest(latents),
        "tuned": info["sha256"],
    }
    residuals: list[float] = []
    shape = (params.steps + 1, *clip.shape)
    states = inversion_states(
        unet,
        scheduler,
        clip,
        text.to(unet.dtype),
        params.steps,
        on_step=progress.update,
        control=signal,
        iterations=params.iterations if params.method == "fixed-point" else 1,
        tolerance=params.tolerance,
        regularization=params.regularization,
        on_residual=residuals.append,
        window=windows,
    )
    del clip  # Of a long clip, one state at a time is in memory.
    with (
        atomic_folder(out) as folder,
        TensorWriter(
            folder / "trajectory.safetensors", "trajectory", shape, kept, {**described, "shape": "n b c f h w"}
        ) as trajectory,
        progress,
        text_projected_once(unet),
    ):
        for state in states:
            if not torch.isfinite(state).all():
                raise TavError("invert: the inverted latents are not finite; set invert.precision to float32")
            if not torch.isfinite(state.to(kept)).all():
                raise TavError("invert: the trajectory is not finite; set invert.trajectory to float32")
            trajectory.write(state[None])  # State by state: together they are large.
        save_tensors(folder / "inverted.safetensors", {"latents": state.cpu()}, {**described, "shape": "b c f h w"})
    if residuals and max(residuals) > params.tolerance:
        logger.warning(
            "fixed-point inversion: the latents still changed by up to %.2g of their norm; more invert.steps help",
            max(residuals),
        )
