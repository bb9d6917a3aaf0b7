"""Decode: the frames of a clip, at one size, as a tensor and as a video to look at."""

from __future__ import annotations

import shutil
from pathlib import Path

from tav.config import DecodeParams
from tav.media.decoding import decoded_frames
from tav_model.digests import digest
from tav_model.files import atomic_folder
from tav_model.tensors import TensorWriter
from tav_model.video import video_writer

CHUNK = 16  # frames in memory at a time
AUDIO = "audio.m4a"


def decode(video: Path, out: Path, params: DecodeParams) -> None:
    """Write `frames.safetensors` (`frames`: uint8, `f h w c`) and `source.mp4` into `out`.

    Where the frames are all of a video that has sound, `audio.m4a` has that.

    Args:
        video: a video, or a folder of numbered images.
        out: the folder to write; an existing one is replaced.
        params: the section `decode` of params.yaml.

    Raises:
        TavError: see `tav.media.decoding.decoded_frames`.
    """
    import torch

    with decoded_frames(video, params, audio=True) as frames, atomic_folder(out) as folder:
        metadata = {
            "stage": "decode",
            "shape": "f h w c",
            "scale": "0..255",
            "fps": str(frames.fps),
            "source": digest(video),
        }
        with (
            TensorWriter(folder / "frames.safetensors", "frames", frames.shape, torch.uint8, metadata) as tensors,
            video_writer(folder / "source.mp4", frames.fps) as mp4,
        ):
            for start in range(0, len(frames), CHUNK):
                part = frames[start : start + CHUNK]
                tensors.write(torch.from_numpy(part))
                mp4.write(part)
        if frames.audio is not None:
            shutil.copyfile(frames.audio, folder / AUDIO)
