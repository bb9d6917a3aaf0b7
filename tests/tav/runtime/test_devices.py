"""One process at a time on a GPU, and less at a time when memory does not suffice."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tasks.encode import encode
from tasks.tune import tune
from tav.config import AttentionParams, EncodeParams, TuneParams
from tav.runtime import devices
from tav.runtime.devices import (
    DevicePool,
    choose_devices,
    gpu_identity,
    is_out_of_memory,
    resolve_precision,
    retry_with_smaller_batch,
)
from tav.runtime.events import Event, EventStream, LoopProgressed, LoopResumed, Stopped
from tav.runtime.progress import Progress
from tav_model.errors import TavError
from tav_model.tensors import load_tensors, save_tensors
from tests.support.models import small_base

HOLD = """
import time
from tav.runtime import devices
devices.gpu_identity = lambda device: "GPU-1"
with devices.DevicePool(["cpu"]).hold():
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose devices cuda:0 and cuda:1 are GPU-1 and GPU-2."""
    names = {"cpu": None, "cuda:0": "GPU-1", "cuda:1": "GPU-2"}
    monkeypatch.setattr(devices, "gpu_identity", names.__getitem__)
    monkeypatch.setenv("TAV_LOCKS", str(tmp_path))


@pytest.fixture
def other_process(gpus: None) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds GPU-1."""
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def hold(pool: DevicePool, **options: Any) -> tuple[threading.Event, threading.Event, list[str], threading.Thread]:
    """A thread that holds a device of the pool: an event that it does, one that lets it go on, and which device it is."""
    holds, release, device = threading.Event(), threading.Event(), []

    def work() -> None:
        with pool.hold(**options) as slot:
            device.append(slot.device)
            holds.set()
            release.wait(30)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return holds, release, device, thread


def test_computing_is_deterministic_and_new_memory_is_not_filled():
    choose_devices("cpu")
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.slow
def test_a_gpu_in_use_is_waited_for_until_its_process_is_gone(
    other_process: subprocess.Popen[str], caplog: pytest.LogCaptureFixture
) -> None:
    holds, release, device, thread = hold(DevicePool(["cuda:0"]))
    assert not holds.wait(1.5)
    assert caplog.text.count("waiting for a GPU that another process uses") == 1
    for free in ("cuda:1", "cpu"):
        elsewhere, let_go, *_ = hold(DevicePool([free]))
        assert elsewhere.wait(5), free
        let_go.set()
    os.kill(other_process.pid, signal.SIGKILL)
    assert holds.wait(5) and device == ["cuda:0"]
    release.set()
    thread.join(5)


def test_a_pool_takes_the_gpu_that_is_free(other_process: subprocess.Popen[str]) -> None:
    holds, release, device, _ = hold(DevicePool(["cuda:0", "cuda:1"]))
    assert holds.wait(5) and device == ["cuda:1"]
    release.set()


def test_one_device_is_held_by_one_stage_at_a_time_and_two_by_two() -> None:
    for devices_, at_once in ((["cpu"], 1), (["cpu", "cpu"], 2)):
        pool = DevicePool(devices_)
        held = [hold(pool) for _ in range(3)]
        deadline = time.monotonic() + 5
        while sum(holds.is_set() for holds, *_ in held) < at_once and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert sum(holds.is_set() for holds, *_ in held) == at_once
        for _, release, *_ in held:
            release.set()
        for *_, thread in held:
            thread.join(5)
            assert not thread.is_alive()


def test_the_clip_in_front_goes_first() -> None:
    pool, order = DevicePool(["cpu"]), []
    first, release, *_ = hold(pool)
    assert first.wait(5)

    def work(priority: int) -> None:
        with pool.hold(priority):
            order.append(priority)

    threads = [threading.Thread(target=work, args=[priority]) for priority in (2, 0, 1)]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    release.set()
    for thread in threads:
        thread.join(5)
    assert order == [0, 1, 2]


def test_a_loaded_model_stays_until_another_stage_takes_its_device(gpus: None, tmp_path: Path) -> None:
    pool = DevicePool(["cuda:0", "cuda:1"])
    with pool.hold() as slot:
        slot.resident["edit ball"] = "a model"
        device = slot.device
    with pool.hold(prefer="edit ball") as slot:
        assert (slot.device, slot.resident) == (device, {"edit ball": "a model"})
        with pool.hold(prefer="edit ball") as other:
            assert other.device != device and other.resident == {}
    assert is_locked(tmp_path / "tav-GPU-1.lock")  # the model is still on it
    pool.drop("edit ball")
    assert not is_locked(tmp_path / "tav-GPU-1.lock")
    single = DevicePool(["cuda:0"])
    with single.hold() as slot:
        slot.resident["edit ball"] = "a model"
    with single.hold() as slot:
        assert slot.resident == {}


def is_locked(path: Path) -> bool:
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_shares_of_a_device_are_not_waited_for(other_process: subprocess.Popen[str]) -> None:
    pool = DevicePool(["cuda:0"], exclusive=False)
    with pool.hold() as one, pool.hold() as other:
        assert one.device == other.device == "cuda:0"


def test_the_lock_file_is_no_way_to_other_files(gpus: None, tmp_path: Path) -> None:
    (tmp_path / "tav-GPU-1.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(TavError, match=r"tav-GPU-1\.lock: cannot be opened .*TAV_LOCKS"), DevicePool(["cuda:0"]).hold():
        pass
    assert not (tmp_path / "precious").exists()


def test_devices_are_chosen_by_name_or_all_that_there_are() -> None:
    assert choose_devices("cpu") == ["cpu"] and choose_devices(["cpu", "cpu"]) == ["cpu", "cpu"]
    assert choose_devices("auto") == ([f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"])
    with pytest.raises(TavError, match=r"params\.yaml: runtime\.device: 'cuda:99' is not usable here"):
        choose_devices(["cpu", "cuda:99"])


@pytest.mark.parametrize(
    ("device", "capabilities", "expected"),
    [
        ("cpu", {"amx_bf16": True, "avx512_bf16": True}, "bfloat16"),
        ("cpu", {"amx_bf16": False, "avx512_bf16": True}, "bfloat16"),
        ("cpu", {"avx512_f": True, "bf16": True}, "float32"),  # Not measured on ARM.
        ("mps", {"amx_bf16": True}, "float32"),
    ],
)
def test_automatic_precision(
    monkeypatch: pytest.MonkeyPatch, device: str, capabilities: dict[str, bool], expected: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert resolve_precision("auto", device) == expected
    assert resolve_precision("float16", device) == "float16"


def test_automatic_precision_on_gpus_and_with_older_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for supported in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: supported)  # noqa: B023
        assert resolve_precision("auto", "cuda:1") == ("bfloat16" if supported else "float32")
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert resolve_precision("auto", "cpu") == "float32"


def test_a_cpu_is_no_gpu() -> None:
    assert gpu_identity("cpu") is None and gpu_identity("mps").endswith("-mps")


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


def test_a_smaller_batch_is_tried_where_memory_runs_out() -> None:
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
        progress=Progress(EventStream(), stage="encode", total=4),
    )
    return load_tensors(out / "latents.safetensors")[0]


@pytest.mark.slow
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
            progress=Progress(EventStream(note), stage="tune", total=6),
        )
        return load_tensors(tmp_path / name / "tuned.safetensors")[0]

    steps: list[object] = []

    def note(event: Event) -> None:
        if isinstance(event, LoopProgressed):
            steps.append(event.record.step)
        elif isinstance(event, LoopResumed) and event.records:
            steps.append([record.step for record in event.records])

    plain = tuned("plain")

    def large_step(self, *inputs):
        if len(self.history) == 3 and not self.config.gradient_checkpointing:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real_step(self, *inputs)

    monkeypatch.setattr(Tuner, "step", large_step)
    steps.clear()
    with_less = tuned("with-less")
    assert steps == [1, 2, 3, [1, 2], 3, 4, 5, 6]  # those of the checkpoint at step 2 are published again
    for name, tensor in plain.items():
        torch.testing.assert_close(with_less[name], tensor, rtol=1e-4, atol=1e-6)


def test_a_gpu_named_twice_takes_two_stages_of_this_process(gpus: None, tmp_path: Path) -> None:
    pool = DevicePool(["cuda:0", "cuda:0"])
    with pool.hold() as one:
        with pool.hold() as other:
            assert one is not other and one.device == other.device == "cuda:0"
        assert is_locked(tmp_path / "tav-GPU-1.lock")
    assert not is_locked(tmp_path / "tav-GPU-1.lock")


def test_waiting_for_another_process_can_be_stopped(other_process: subprocess.Popen[str]) -> None:
    events = EventStream()
    threading.Timer(0.3, events.stop).start()
    with pytest.raises(Stopped), DevicePool(["cuda:0"]).hold(check=events.check):
        pass


def test_memory_is_returned_before_a_gpu_is(gpus: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked: list[bool] = []
    monkeypatch.setattr(devices, "release_memory", lambda: locked.append(is_locked(tmp_path / "tav-GPU-1.lock")))
    pool = DevicePool(["cuda:0"])
    with pool.hold() as slot:
        slot.resident["edit ball"] = "a model"
    pool.drop("edit ball")
    assert locked == [True] and not is_locked(tmp_path / "tav-GPU-1.lock")


def test_gradients_are_deterministic_as_long_as_any_thread_wants_them() -> None:
    before = torch.get_deterministic_debug_mode()
    try:
        torch.set_deterministic_debug_mode("warn")
        with devices.deterministic_gradients("cpu"):
            assert torch.get_deterministic_debug_mode() == 1
        with devices.deterministic_gradients("cuda:0"):
            with pytest.raises(KeyError), devices.deterministic_gradients("cuda:1"):
                raise KeyError
            assert torch.get_deterministic_debug_mode() == 2
        assert torch.get_deterministic_debug_mode() == 1
    finally:
        torch.set_deterministic_debug_mode(before)
