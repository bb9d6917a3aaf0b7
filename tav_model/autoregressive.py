"""Autoregressive editing of long clips: window after window, each held to its predecessor where they overlap.

Averaging the windows of a clip (`tav_model.windows`) takes one step of all of them at a time, so nothing is finished before
the end. Here a window is sampled to the end before the next one begins. After each of its steps, the frames that it shares
with its predecessor, and the anchor, are set to what they were there after the same step. Everything stays in latents:
frames that are decoded and encoded again drift in colour.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tav_model.tensors import StoredTensor, load_tensors, save_tensors
from tav_model.windows import Window, WindowOptions, select, without_anchor

if TYPE_CHECKING:
    from collections.abc import Callable

    from tav_model.pipeline import TuneAVideoPipeline


@dataclass(frozen=True)
class FinishedFrames:
    """The frames that a window adds to those of its predecessors.

    Attributes:
        start: index of the first.
        stop: index after the last.
        latents: `b c f h w`.
        masks: as `TuneAVideoPipelineOutput` has them; None without a mask.
        resumed: whether they were found rather than sampled.
    """

    start: int
    stop: int
    latents: torch.Tensor
    masks: torch.Tensor | None = None
    resumed: bool = False


class _PartOfTrajectory:
    """The states of a trajectory, `1 c f h w`, with the frames of a window."""

    def __init__(self, states: torch.Tensor | StoredTensor, window: Window) -> None:
        self.states, self.window = states, window
        n, b, c, _, h, w = states.shape
        self.shape, self.ndim = (n, b, c, len(window) + window.anchored, h, w), 6

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, index: int) -> torch.Tensor:
        return select(self.states[index], self.window)


def edit_autoregressively(
    pipeline: TuneAVideoPipeline,
    prompt: str | Sequence[str],
    latents: torch.Tensor,
    options: WindowOptions,
    folder: str | Path,
    *,
    trajectory: torch.Tensor | StoredTensor | None = None,
    mask: torch.Tensor | str | None = None,
    conditioning_frames: Any = None,
    callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
    **arguments: Any,
) -> Iterator[FinishedFrames]:
    """Yield the frames of an edit in order, window by window, as soon as they are finished.

    What is finished is kept in `folder`. With the same arguments, a call that was interrupted resumes after the last finished
    window, and its result is bit-identical to that of one that was not.

    Args:
        pipeline: the tuned model.
        prompt: one, or a list of b.
        latents: the first latents, `1 c f h w` or `b c f h w`.
        options: the windows, those of the inversion.
        folder: of this edit alone; files of finished windows are left in it.
        trajectory: as for the pipeline.
        mask: as for the pipeline.
        conditioning_frames: as for the pipeline.
        callback_on_step_end: as for the pipeline, with the latents; may not change them.
        arguments: others of the pipeline.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    windows = options.windows(latents.shape[2])
    anchor = former = None  # Their states after each step, `n b c f h w`.
    for number, window in enumerate(windows):
        path = folder / f"window-{number:05d}.safetensors"
        start = windows[number - 1].stop if number else 0
        resumed = path.exists()
        if not resumed:
            states, masks = _sample(
                pipeline,
                window,
                _held(window, anchor, former),
                callback_on_step_end,
                prompt=prompt,
                latents=select(latents, window),
                **_of_window(window, latents.shape[2], trajectory, mask, conditioning_frames),
                **arguments,
            )
            tensors = {"latents": states[-1][:, :, start - window.start :]}
            if number + 1 < len(windows):
                tensors["overlap"] = states[:, :, :, windows[number + 1].start - window.start :]
            if not number:
                tensors["anchor"] = states[:, :, :, :1]
            if masks is not None:
                tensors["masks"] = without_anchor(masks[:, None], window)[:, 0, start - window.start :].cpu()
            save_tensors(
                path, tensors, {"stage": "edit", "shape": "n b c f h w", "frames": f"{start}..{window.stop - 1}"}
            )
        stored, _ = load_tensors(path)
        former, anchor = stored.get("overlap"), stored.get("anchor", anchor)
        yield FinishedFrames(start, window.stop, stored["latents"], stored.get("masks"), resumed)


def _held(window: Window, anchor: torch.Tensor | None, former: torch.Tensor | None) -> torch.Tensor | None:
    """Return the states of a window's first frames that are known already, `n b c f h w`."""
    if former is None:
        return None
    return torch.cat([anchor, former], dim=3) if window.anchored and anchor is not None else former


def _sample(
    pipeline: TuneAVideoPipeline,
    window: Window,
    held: torch.Tensor | None,
    callback_on_step_end: Callable[..., dict[str, Any]] | None,
    **arguments: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Sample a window; return its frames after every step, `n b c f h w` without the anchor, and its masks."""
    states: list[torch.Tensor] = []

    def after_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        latents = tensors["latents"]
        if held is not None:
            latents = latents.clone()
            latents[:, :, : held.shape[3]] = held[len(states)].to(latents)
        states.append(without_anchor(latents, window).cpu())
        if callback_on_step_end is not None:
            callback_on_step_end(pipe, step, timestep, tensors | {"latents": latents})
        return {"latents": latents}

    output: Any = pipeline(output_type="latent", callback_on_step_end=after_step, **arguments)
    return torch.stack(states), output.masks


def _of_window(
    window: Window,
    num_frames: int,
    trajectory: torch.Tensor | StoredTensor | None,
    mask: torch.Tensor | str | None,
    conditioning_frames: Any,
) -> dict[str, Any]:
    """Return those arguments of the pipeline that have frames, with those of a window."""
    arguments: dict[str, Any] = {"mask": mask}
    if trajectory is not None:
        arguments["trajectory"] = _PartOfTrajectory(trajectory, window)
    if mask is not None and not isinstance(mask, str):
        pixels = torch.as_tensor(mask)
        pixels = pixels[None] if pixels.ndim == 3 else pixels
        # A mask of a single frame is that of all frames.
        arguments["mask"] = select(pixels[:, None], window)[:, 0] if pixels.shape[1] == num_frames else pixels
    if conditioning_frames is not None:
        from tav_model.control import to_condition

        several = isinstance(conditioning_frames, (list, tuple)) and not hasattr(conditioning_frames[0], "convert")
        parts = [
            select(to_condition(one), window) for one in (conditioning_frames if several else [conditioning_frames])
        ]
        arguments["conditioning_frames"] = parts if several else parts[0]
    return arguments
