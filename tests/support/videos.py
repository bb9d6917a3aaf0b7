"""A moving square, and the parameters that decode it."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np

from tav.config import DecodeParams


def decode(**changes) -> DecodeParams:
    return DecodeParams(**{"frames": 6, "width": 64, "height": 64} | changes)


def moving_square(frames: int = 6, height: int = 64, width: int = 96) -> np.ndarray:
    """A bright square on a gradient, further right in each frame."""
    video = np.zeros((frames, height, width, 3), np.uint8)
    video[..., 2] = np.linspace(40, 160, width).astype(np.uint8)
    for i, frame in enumerate(video):
        frame[20:36, 8 + 8 * i : 24 + 8 * i] = (230, 120, 30)
    return video


def write_tone(path: Path, seconds: float = 1, rate: int = 44100) -> None:
    """A tone of 440 Hz as AAC in an MP4."""
    wave = (0.3 * np.sin(2 * np.pi * 440 * np.arange(round(rate * seconds)) / rate)).astype(np.float32)
    with av.open(str(path), "w", format="mp4") as container:
        sound = container.add_stream("aac", rate=rate, layout="mono")
        for start in range(0, len(wave), 1024):
            frame = av.AudioFrame.from_ndarray(wave[None, start : start + 1024], format="fltp", layout="mono")
            frame.sample_rate, frame.pts = rate, start
            container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
