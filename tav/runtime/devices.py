"""The devices that stages compute on: chosen, held by one stage at a time, and what to do when their memory runs out."""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import logging
import os
import platform
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tav_model.errors import TavError, first_line

Result = TypeVar("Result")
POLL_SECONDS = 0.5

logger = logging.getLogger(__name__)


def choose_devices(setting: str | Sequence[str]) -> list[str]:
    """Return the devices that `runtime.device` means: `auto` is every GPU of this machine, or its CPU.

    A list may name a device several times: so many stages then compute on it side by side.

    Raises:
        TavError: a device that this machine does not have.
    """
    # cuBLAS computes the same bits each time only with this workspace.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    if setting == "auto":
        names = [f"cuda:{number}" for number in range(torch.cuda.device_count())] or ["cpu"]
    else:
        names = [setting] if isinstance(setting, str) else list(setting)
    for name in names:
        try:
            torch.empty(1, device=name)
        except (RuntimeError, AssertionError) as error:
            raise TavError(f"params.yaml: runtime.device: {name!r} is not usable here ({first_line(error)})") from None
    # The effect of use_deterministic_algorithms, which also imports torch's compiler: a second in each stage.
    torch.set_deterministic_debug_mode("warn")
    return names


def choose_device(setting: str | Sequence[str]) -> str:
    """Return the first of the devices that `runtime.device` means. Raises TavError as `choose_devices`."""
    return choose_devices(setting)[0]


def gpu_name(device: str) -> str | None:
    """Return what tells this GPU from all others, whatever its number in this process; None for a CPU."""
    kind, _, index = device.partition(":")
    if kind == "cpu":
        return None
    if kind != "cuda":
        return f"{platform.node()}-{kind}"
    import torch

    number = int(index) if index else torch.cuda.current_device()
    return str(getattr(torch.cuda.get_device_properties(number), "uuid", f"{platform.node()}-{number}"))


class Slot:
    """One device of a pool, while a stage holds it.

    Attributes:
        device: its name, as torch knows it.
        resident: what the last holder left on the device for the next, such as a loaded model, by name.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.resident: dict[str, Any] = {}
        self._lock: int | None = None  # descriptor of the GPU's lock file

    def try_lock(self) -> str | None:
        """Lock the GPU for this process; returns the path of its lock file where another process has it."""
        name = gpu_name(self.device)
        if name is None or self._lock is not None:
            return None
        path = _lock_path(name)
        descriptor = _open(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return str(path)
        self._lock = descriptor
        return None

    def clear(self) -> None:
        """Drop what is resident, and let other processes have the GPU."""
        if self.resident:
            self.resident.clear()
            release_memory()
        self.unlock()

    def unlock(self) -> None:
        """Let other processes have the GPU."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


class DevicePool:
    """Devices that stages hold one at a time, within this process and, for GPUs, on this machine.

    The lock of a GPU is a file in the folder TAV_LOCKS (default: the system's for temporary files) that all projects,
    entry points and containers of a machine share. It ends with the process, however that ends.

    Args:
        devices: names for torch; a name may occur several times.
        exclusive: False where something else hands out shares of the devices, such as Ray: then every `hold` returns
            the first device at once.
    """

    def __init__(self, devices: Sequence[str], exclusive: bool = True) -> None:
        self.devices, self.exclusive = list(devices), exclusive
        self._free = [Slot(device) for device in devices]
        self._waiting: list[tuple[int, int]] = []
        self._tickets = 0
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self.devices)

    @contextlib.contextmanager
    def hold(self, priority: int = 0, prefer: str | None = None) -> Iterator[Slot]:
        """Hold one of the devices, waiting for it where need be.

        Args:
            priority: of those that wait, the lowest is first; then whoever came first.
            prefer: take a device on which this is resident, where one is free.

        Raises:
            TavError: the lock file of a GPU cannot be made.
        """
        if not self.exclusive:
            yield Slot(self.devices[0])
            return
        slot = self._take(priority, prefer)
        try:
            yield slot
        finally:
            if not slot.resident:
                slot.unlock()
            with self._changed:
                self._free.append(slot)
                self._changed.notify_all()

    def _take(self, priority: int, prefer: str | None) -> Slot:
        with self._changed:
            self._tickets += 1
            ticket = (priority, self._tickets)
            heapq.heappush(self._waiting, ticket)
            warned = False
            try:
                while True:
                    if self._waiting[0] == ticket and self._free:
                        locked_elsewhere = None
                        for slot in sorted(self._free, key=lambda slot: prefer not in slot.resident):
                            locked_elsewhere = slot.try_lock()
                            if locked_elsewhere is None:
                                self._free.remove(slot)
                                break
                        else:
                            if not warned:
                                logger.warning("waiting for a GPU, in use by another process (%s)", locked_elsewhere)
                                warned = True
                            self._changed.wait(POLL_SECONDS)
                            continue
                        break
                    self._changed.wait(POLL_SECONDS)
            finally:
                self._waiting.remove(ticket)
                heapq.heapify(self._waiting)
                self._changed.notify_all()
        if slot.resident and prefer not in slot.resident:
            slot.resident.clear()
            release_memory()
        return slot

    def drop(self, resident: str) -> None:
        """Drop this from the devices that nobody holds now; their GPUs are then free for other processes."""
        with self._changed:
            for slot in self._free:
                if slot.resident.pop(resident, None) is not None and not slot.resident:
                    slot.clear()


def _lock_path(name: str) -> Path:
    folder = Path(os.environ.get("TAV_LOCKS") or tempfile.gettempdir())
    return folder / f"tav-{re.sub(r'[^A-Za-z0-9-]+', '-', name)}.lock"


def _open(path: Path) -> int:
    """Open a lock file. A link is never followed; in a sticky folder, another user's file cannot be opened by O_CREAT."""
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        try:
            return os.open(path, os.O_RDONLY | flags)
        except FileNotFoundError:
            return os.open(path, os.O_RDONLY | os.O_CREAT | flags, 0o644)
    except OSError as error:
        raise TavError(f"{path}: cannot be opened ({error.strerror}); set TAV_LOCKS to a folder of your own") from None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out, the GPU's or the machine's."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
    )


def retry_with_smaller_batch(action: Callable[[int], Result], size: int, what: str) -> tuple[Result, int]:
    """Return the result of `action(size)`, at half the size each time memory runs out, and the size that sufficed.

    Args:
        action: called with the size of a batch.
        size: the size to begin with.
        what: what there are fewer of, for the log: `frames at a time`.

    Raises:
        Exception: an error of the action; the one about memory where even a size of 1 is too much.
    """
    while True:
        try:
            return action(size), size
        except Exception as error:
            if not is_out_of_memory(error) or size <= 1:
                raise
            reason = first_line(error)
        # Outside of the handler, which keeps the frames of the call and all their tensors alive.
        size //= 2
        release_memory()
        logger.warning("out of memory (%s): retrying with %s of %d", reason, what, size)


def release_memory() -> None:
    """Return to the GPU the memory that this process holds without using it."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
