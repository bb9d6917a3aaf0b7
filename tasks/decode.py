"""Decode: the frames of a clip, at one size, as a tensor and as a video to look at."""

from __future__ import annotations

from pathlib import Path

from tav.config import DecodeParams
from tav.media.decoding import read_frames
from tav_model.digests import digest
from tav_model.files import atomic_folder
from tav_model.tensors import save_tensors
from tav_model.video import write_video


def decode(video: Path, out: Path, params: DecodeParams) -> None:
    """Write `frames.safetensors` (`frames`: uint8, `f h w c`) and `source.mp4` into `out`.

    Args:
        video: a video, or a folder of numbered images.
        out: the folder to write; an existing one is replaced.
        params: the section `decode` of params.yaml.

    Raises:
        TavError: see `tav.media.decoding.read_frames`.
    """
    import torch

    frames, fps = read_frames(video, params)
    metadata = {"stage": "decode", "shape": "f h w c", "scale": "0..255", "fps": str(fps), "source": digest(video)}
    with atomic_folder(out) as folder:
        save_tensors(folder / "frames.safetensors", {"frames": torch.from_numpy(frames)}, metadata)
        write_video(folder / "source.mp4", frames, fps)
