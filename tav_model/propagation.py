"""Propagate features along the motion of the source, so that what is generated looks alike in all frames.

Spatio-temporal attention ties a frame to others only as far as they look alike already: a new object may have another pattern
in each frame. Here the features at each position become the mean of those, in several frames, at the positions that show the
same point of the source (TokenFlow, Geyer et al., arXiv 2307.10373). Which positions those are is found once, by the features
of a pass over the source at a low noise level (DIFT, Tang et al., arXiv 2306.03881); TokenFlow compares the features of each
step.

Propagated are the outputs of the spatio-temporal attention, as in TokenFlow, or those of complete transformer blocks, which
ties frames more strongly: in the first steps, which decide on the layout, it holds a new object together; in all steps, it
blurs.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import embedding_bag, normalize

from tav_model.attention_control import transformer_blocks
from tav_model.compiling import uncompiled

if TYPE_CHECKING:
    from tav_model.networks.unet import UNet3DConditionModel
    from tav_model.trajectory import Trajectory
    from tav_model.windows import Window

NOISE_LEVEL = 0.3
"""The noise level at which features are compared, as a share of the timesteps of training."""
KEY_FRAMES = 8
"""Frames of a pass that the mean is taken over, at most: evenly spaced ones."""


class Propagation:
    """Propagate features while a UNet samples.

    Args:
        attention: share of the steps, from the first, in which the outputs of spatio-temporal attention are propagated.
        features: share of the steps in which the outputs of transformer blocks are.
        num_steps: number of sampling steps.
    """

    def __init__(self, attention: float, features: float, num_steps: int) -> None:
        self.attention, self.features, self.num_steps = attention, features, num_steps
        self._positions: dict[int, torch.Tensor] = {}  # by the block, where the network sees all frames
        # Those of the many windows of a long clip are in files: memory does not depend on the number of frames.
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._step = self._rows = self._first_row = 0
        self._window: Window | None = None

    @property
    def is_on(self) -> bool:
        """Whether anything is propagated in any step."""
        return self.attention > 0 or self.features > 0

    def begin_step(self, step: int, rows: int, first_row: int, window: Window | None = None) -> None:
        """Announce the next pass of the network.

        Args:
            step: number of the step.
            rows: of the batch.
            first_row: the first one whose features are propagated.
            window: the frames of the rows; None: all.
        """
        self._step, self._rows, self._first_row, self._window = step, rows, first_row, window

    def learn(self, unet: UNet3DConditionModel, source: Trajectory, predict: Callable[..., Any]) -> None:
        """Find the correspondences in passes over the source.

        Args:
            unet: the network.
            source: the trajectory of the inversion.
            predict: runs the network, with the latents and the timestep that it is called with as the only row of each batch,
                and calls what it receives as `announce` before each pass, with its frames (None: all).
        """
        # An inversion of a single step ends at the first timestep.
        timestep = min(round(NOISE_LEVEL * source.scheduler.config.num_train_timesteps), source.timesteps[-1])

        def announce(window: Window | None) -> None:
            self._window = window

        blocks = enumerate(transformer_blocks(unet))
        handles = [block.attn1.register_forward_hook(partial(self._compare, number)) for number, block in blocks]
        with _attached(unet, handles):
            predict(source.at(timestep), timestep, announce=announce)

    @contextlib.contextmanager
    def attached(self, unet: UNet3DConditionModel) -> Iterator[None]:
        """Propagate the network's features until the context ends, which is once."""
        handles = []
        for number, block in enumerate(transformer_blocks(unet)):
            for share, module in ((self.attention, block.attn1), (self.features, block)):
                if share:
                    handles.append(module.register_forward_hook(partial(self._propagate, number, share)))
        with (
            self._folder or contextlib.nullcontext(),
            _attached(unet, handles) if handles else contextlib.nullcontext(),
        ):
            yield

    def _compare(self, block: int, module: Any, inputs: tuple[torch.Tensor, int], output: torch.Tensor) -> None:
        positions = corresponding_positions(inputs[0])
        if self._window is None:
            self._positions[block] = positions
        else:
            np.save(self._file(block, self._window), positions.cpu().numpy())

    def _propagate(self, block: int, share: float, module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        """Propagate the tokens of an output, `(batch f) n c`, in place."""
        if self._step < share * self.num_steps:
            positions = self._positions_of(block).to(output.device)
            for row in output.unflatten(0, (self._rows, -1))[self._first_row :]:
                row.copy_(propagate(row, positions))
        return output

    def _positions_of(self, block: int) -> torch.Tensor:
        if self._window is None:
            return self._positions[block]
        return torch.from_numpy(np.load(self._file(block, self._window)))

    def _file(self, block: int, window: Window) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="tav-")
        return Path(self._folder.name) / f"{window.start}-{block}.npy"


@contextlib.contextmanager
def _attached(unet: UNet3DConditionModel, handles: list[Any]) -> Iterator[None]:
    """Run the network with hooks, which are removed at the end."""
    try:
        with uncompiled(unet):
            yield
    finally:
        for handle in handles:
            handle.remove()


def key_frames(num_frames: int) -> list[int]:
    """Return the frames that the mean is taken over."""
    number = min(num_frames, KEY_FRAMES)
    return [(2 * place + 1) * num_frames // (2 * number) for place in range(number)]


def corresponding_positions(features: torch.Tensor) -> torch.Tensor:
    """Return where the key frames show what each position shows: by the largest cosine of features `f n c`.

    Returns:
        `(f n) k` in int32: for each position, one of each of the k key frames, counted among the `(k n)` of all of them.
    """
    directions = normalize(features.float(), dim=-1)
    n = directions.shape[1]
    found = [
        # Frame by frame: all of them together would be large.
        torch.stack([(frame @ directions[key].mT).argmax(dim=-1) for frame in directions]) + place * n
        for place, key in enumerate(key_frames(len(directions)))
    ]
    return torch.stack(found, dim=-1).flatten(0, 1).int()


def propagate(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return the mean of the tokens `f n c` at the corresponding positions, see `corresponding_positions`."""
    keys = tokens[key_frames(len(tokens))].flatten(0, 1)
    return embedding_bag(positions, keys, mode="mean").view_as(tokens)
