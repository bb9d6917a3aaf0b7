"""Windows over the frames of a long clip, so that the memory of the network does not depend on the number of frames.

The network sees `context_length` frames at a time. Neighbouring windows begin `context_stride` frames apart and overlap; the
last one ends with the clip. In the overlaps, predictions are averaged, with weights that fall towards the ends of a
window (FreeNoise, arXiv 2310.15169). Frame 0 comes before each window as an anchor: sparse-causal attention has its keys
from the first frame and the former one, so that the anchor carries the first frame's appearance into every window.

The temporal attention has no position encoding, so any window length is valid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

WEIGHTINGS = ("pyramid", "uniform")


@dataclass(frozen=True)
class Window:
    """Consecutive frames that the network sees at once.

    Attributes:
        start: index of the first frame.
        stop: index after the last frame.
        anchored: whether frame 0 comes before them. What is computed for it is dropped.
    """

    start: int
    stop: int
    anchored: bool = False

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class WindowOptions:
    """How a clip is divided into windows. A clip of at most `context_length` frames is not.

    Attributes:
        context_length: frames of a window, without the anchor.
        context_stride: frames from the start of a window to that of the next; by default half of a window.
        anchor: frame 0 comes before every window that does not begin with it.
        weighting: of the predictions of a window: "pyramid", 1 at its ends and growing by 1 to its middle, or "uniform".

    Raises:
        ValueError: no frames, a stride that leaves frames out, or an unknown weighting.
    """

    context_length: int
    context_stride: int | None = None
    anchor: bool = True
    weighting: str = "pyramid"

    def __post_init__(self) -> None:
        if self.context_length < 1:
            raise ValueError(f"context_length: {self.context_length} must be at least 1")
        if not 1 <= self.stride <= self.context_length:
            raise ValueError(
                f"context_stride: {self.context_stride} must be from 1 to the context_length, {self.context_length}"
            )
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"weighting: {self.weighting!r} must be one of {', '.join(WEIGHTINGS)}")

    @property
    def stride(self) -> int:
        """The stride, where it is the default one, too."""
        return max(self.context_length // 2, 1) if self.context_stride is None else self.context_stride

    def fits(self, num_frames: int) -> bool:
        """Return whether a clip of so many frames is not divided."""
        return num_frames <= self.context_length

    def windows(self, num_frames: int) -> list[Window]:
        """Return the windows of a clip, in order. Together they have all of its frames."""
        last = max(num_frames - self.context_length, 0)
        return [self._window(start, num_frames) for start in (*range(0, last, self.stride), last)]

    def draw(self, num_frames: int, generator: torch.Generator) -> Window:
        """Draw a window, to tune on.

        The start is drawn from half a window before the clip to half a window beyond the last start, and moved into the
        clip: otherwise the frames at both ends would be in few windows.
        """
        import torch

        last, margin = max(num_frames - self.context_length, 0), self.context_length // 2
        drawn = int(torch.randint(-margin, last + margin + 1, (1,), generator=generator))
        return self._window(min(max(drawn, 0), last), num_frames)

    def _window(self, start: int, num_frames: int) -> Window:
        return Window(start, min(start + self.context_length, num_frames), self.anchor and start > 0)

    def weights(self, length: int) -> list[int]:
        """Return the weight of each frame in a window of `length` frames."""
        return [min(i + 1, length - i) if self.weighting == "pyramid" else 1 for i in range(length)]


def select(tensor: torch.Tensor, window: Window | None) -> torch.Tensor:
    """Return a window's frames of `b c f ...`, the anchor first; all frames, the tensor itself, without a window."""
    import torch

    if window is None:
        return tensor
    frames = tensor[:, :, window.start : window.stop]
    return torch.cat([tensor[:, :, :1], frames], dim=2) if window.anchored else frames


def without_anchor(tensor: torch.Tensor, window: Window | None) -> torch.Tensor:
    """Return `b c f h w`, which was computed for a window, without the frame of its anchor."""
    return tensor[:, :, 1:] if window is not None and window.anchored else tensor


def predict_in_windows(
    predict: Callable[[Window | None], torch.Tensor], num_frames: int, options: WindowOptions | None
) -> torch.Tensor:
    """Return the network's prediction for a clip, for each frame the weighted mean of those of its windows.

    Args:
        predict: returns the prediction, `b c k h w`, for the k frames that `select` returns for a window; for all frames of
            a clip that is not divided, where it receives None.
        num_frames: of the clip.
        options: the windows; None does not divide the clip.

    Returns:
        `b c f h w`.
    """
    import torch

    if options is None or options.fits(num_frames):
        return predict(None)
    total: torch.Tensor | None = None
    norm = torch.zeros(num_frames)
    for window in options.windows(num_frames):
        prediction = without_anchor(predict(window), window)
        if total is None:
            b, c, _, h, w = prediction.shape
            dtype = torch.promote_types(prediction.dtype, torch.float32)
            total = prediction.new_zeros(b, c, num_frames, h, w, dtype=dtype)
        weights = torch.tensor(options.weights(len(window)), dtype=torch.float32)
        norm[window.start : window.stop] += weights
        total[:, :, window.start : window.stop] += prediction.to(total) * weights.to(total)[:, None, None]
    assert total is not None  # noqa: S101 (there is at least one window)
    return total.div_(norm.to(total)[:, None, None])
