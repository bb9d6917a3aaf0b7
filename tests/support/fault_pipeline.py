"""The stages of a clip with their commits to DVC in one process, as the flow runs them, for processes to be killed."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

# All that takes time to import: a process that is forked from one which has it begins to work at once.
import av  # noqa: F401
import pandas  # noqa: F401
import torch  # noqa: F401
from diffusers import AutoencoderKL, DDIMScheduler  # noqa: F401
from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

import tav_model.tuning  # noqa: F401
from tasks.__main__ import main
from tasks.clip_stages import ClipStages
from tav.config.stages import STAGES
from tav.runtime.events import EventStream
from tav.runtime.progress_display import standard_error_display
from tav.versioning.dvc_pipeline import DvcPipeline
from tav_model import TuneAVideoPipeline, UNet3DConditionModel  # noqa: F401


def run_pipeline(root: Path, clip: str, output: Path) -> None:
    with output.open("w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    os.chdir(root)
    versions = DvcPipeline(root)
    for stage in STAGES:
        if versions.is_current(stage, clip) or versions.restore(stage, clip):
            continue
        before = versions.snapshot(stage, clip)
        ClipStages(root, clip, EventStream(*standard_error_display())).run(stage)
        versions.commit(stage, clip, before)


def run_stage(root: Path, clip: str, stage: str, output: Path, most: int | None) -> None:
    """`python -m tasks STAGE --clip CLIP`; no file may become larger than `most` bytes."""
    writer = _write_to(output)
    os.chdir(root)
    if most is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    code = main([stage, "--clip", clip])
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    os.waitpid(writer, 0)
    sys.exit(code)


def _write_to(output: Path) -> int:
    # Not the file itself, which the limit would hold for too.
    reading, writing = os.pipe()
    writer = os.fork()
    if writer == 0:
        os.close(writing)
        with output.open("wb") as file:
            while data := os.read(reading, 65536):
                file.write(data)
                file.flush()
        os._exit(0)
    os.close(reading)
    os.dup2(writing, sys.stdout.fileno())
    os.dup2(writing, sys.stderr.fileno())
    os.close(writing)
    return writer
