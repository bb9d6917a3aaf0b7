"""One process at a time on a GPU, and less at a time when memory does not suffice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from tasks.encode import encode
from tasks.tune import tune
from tav.config import AttentionParams, EncodeParams, TuneParams
from tav.runtime import devices
from tav.runtime.devices import exclusive_gpu, gpu_name, is_out_of_memory, retry_with_smaller_batch
from tav.runtime.progress import Progress
from tav_model.errors import TavError
from tav_model.tensors import load_tensors, save_tensors
from tests.support.small_models import small_base

HOLD = """
import sys, time
from tav.runtime import devices
devices.gpu_name = lambda device: "GPU-1"
with devices.exclusive_gpu("cuda:0"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose devices cuda:0 and cuda:1 are GPU-1 and GPU-2."""
    names = {"cpu": None, "cuda:0": "GPU-1", "cuda:1": "GPU-2"}
    monkeypatch.setattr(devices, "gpu_name", names.__getitem__)
    monkeypatch.setenv("TAV_LOCKS", str(tmp_path))


def hold() -> subprocess.Popen:
    """Another process that has GPU-1."""
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def enter(device: str, entered: threading.Event) -> threading.Thread:
    def work() -> None:
        with exclusive_gpu(device):
            entered.set()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_a_gpu_is_waited_for_until_its_holder_is_gone(gpu: None, caplog: pytest.LogCaptureFixture) -> None:
    other = hold()
    entered = threading.Event()
    thread = enter("cuda:0", entered)
    assert not entered.wait(1.5)
    assert "waiting for the GPU GPU-1" in caplog.text and caplog.text.count("waiting") == 1
    for free in ("cuda:1", "cpu"):
        elsewhere = threading.Event()
        enter(free, elsewhere)
        assert elsewhere.wait(5), free
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    assert entered.wait(5)
    thread.join(5)


def test_the_lock_is_no_way_to_other_files(gpu: None, tmp_path: Path) -> None:
    (tmp_path / "tav-GPU-1.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(TavError, match=r"tav-GPU-1\.lock: cannot be opened .*TAV_LOCKS"), exclusive_gpu("cuda:0"):
        pass
    assert not (tmp_path / "precious").exists()


def test_a_cpu_is_no_gpu() -> None:
    assert gpu_name("cpu") is None and gpu_name("mps").endswith("-mps")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_is_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_halving() -> None:
    asked = []

    def action(size: int) -> str:
        asked.append(size)
        if size > 3:
            raise MemoryError
        return f"{size} fit"

    assert retry_with_smaller_batch(action, 12, "things") == ("3 fit", 3) and asked == [12, 6, 3]
    with pytest.raises(MemoryError):
        retry_with_smaller_batch(lambda size: action(9), 2, "things")
    with pytest.raises(KeyError):
        retry_with_smaller_batch({}.__getitem__, 8, "things")


def frames_of(folder: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (4, 32, 32, 3), np.uint8)
    save_tensors(folder / "frames.safetensors", {"frames": torch.from_numpy(pixels)}, {"fps": "8"})
    return folder


def encoded(base: Path, frames: Path, out: Path) -> dict[str, torch.Tensor]:
    encode(
        frames,
        out,
        base=str(base),
        caption="a cat",
        params=EncodeParams(),
        device="cpu",
        chunk=4,
        progress=Progress("encode", total=4),
    )
    return load_tensors(out / "latents.safetensors")[0]


def test_encode_and_tune_go_on_with_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import AutoencoderKL

    from tav_model.tuning import Tuner

    base = small_base(tmp_path / "base")
    frames = frames_of(tmp_path / "frames")
    whole = encoded(base, frames, tmp_path / "whole")
    real_encode, real_step = AutoencoderKL.encode, Tuner.step

    def small_encode(self, images, *more, **settings):
        if len(images) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real_encode(self, images, *more, **settings)

    monkeypatch.setattr(AutoencoderKL, "encode", small_encode)
    halved = encoded(base, frames, tmp_path / "halved")
    for name, tensor in whole.items():
        torch.testing.assert_close(halved[name], tensor, rtol=1e-5, atol=1e-6)

    def tuned(name: str) -> dict[str, torch.Tensor]:
        tune(
            tmp_path / "whole",
            tmp_path / name,
            base=str(base),
            base_name="base",
            attention=AttentionParams(),
            params=TuneParams(steps=6),
            seed=1,
            device="cpu",
            gradient_checkpointing=False,
            checkpoints=tmp_path / "checkpoints",
            checkpoint_every=2,
            progress=Progress("tune", total=6),
            on_step=lambda record: steps.append(record.step),
            on_resume=lambda records: steps.append([record.step for record in records]),
        )
        return load_tensors(tmp_path / name / "tuned.safetensors")[0]

    steps: list[object] = []
    plain = tuned("plain")

    def large_step(self, *inputs):
        if len(self.history) == 3 and not self.config.gradient_checkpointing:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real_step(self, *inputs)

    monkeypatch.setattr(Tuner, "step", large_step)
    steps.clear()
    with_less = tuned("with-less")
    assert steps == [1, 2, 3, [1, 2], 3, 4, 5, 6]  # those of the checkpoint at step 2 are told again
    for name, tensor in plain.items():
        torch.testing.assert_close(with_less[name], tensor, rtol=1e-4, atol=1e-6)
