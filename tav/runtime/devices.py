"""The devices that stages compute on.

They are chosen by `runtime.device`, and held by one stage at a time. Where memory runs out, batches shrink.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import platform
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tav_model.errors import TavError, first_line

Result = TypeVar("Result")
POLL_SECONDS = 0.5

logger = logging.getLogger(__name__)


def choose_devices(setting: str | Sequence[str]) -> list[str]:
    """Return the devices selected by `runtime.device`: `auto` is every GPU of this machine, or its CPU.

    A list may name a device several times: that many stages then compute on it side by side.

    Raises:
        TavError: a device that this machine does not have.
    """
    # cuBLAS is deterministic only with this workspace.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch
    import torch.utils.deterministic

    if setting == "auto":
        names = [f"cuda:{number}" for number in range(torch.cuda.device_count())] or ["cpu"]
    else:
        names = [setting] if isinstance(setting, str) else list(setting)
    for name in names:
        if problem := _problem(name):
            raise TavError(f"params.yaml: runtime.device: {name!r} is not usable here ({problem})")
    # The effect of use_deterministic_algorithms, which also imports torch's compiler: a second in each stage.
    torch.set_deterministic_debug_mode("warn")
    # Results do not depend on memory that nothing has been written to, and filling it takes 4 % of a forward pass on a GPU.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property of the module
    return names


class _DeterministicGradients:
    """How many threads want deterministic gradients now."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._users = 0

    def change(self, users: int) -> None:
        import torch

        with self._mutex:
            self._users += users
            torch.set_deterministic_debug_mode("error" if self._users else "warn")


_deterministic = _DeterministicGradients()


@contextlib.contextmanager
def deterministic_gradients(device: str) -> Iterator[None]:
    """Make backward passes on a GPU bit-identical in every run, in all threads, until the last of these contexts ends.

    The mode of `choose_devices`, which only warns, lets torch take an attention whose gradients are sums in any order, cuDNN's
    on an H100. The strict mode does not. An operation that cannot be deterministic would be an error there; tuning has none.
    """
    if not device.startswith("cuda"):
        yield
        return
    _deterministic.change(1)
    try:
        yield
    finally:
        _deterministic.change(-1)


def _problem(name: str) -> str | None:
    """Return why torch cannot use a device; None if it can.

    Nothing is allocated on a GPU: another process may hold it, with all of its memory.
    """
    import torch

    kind, _, index = name.partition(":")
    if kind == "cuda":
        count = torch.cuda.device_count()
        return None if int(index or 0) < count else f"torch finds {count} GPU{'' if count == 1 else 's'}"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        return first_line(error)
    return None


def choose_device(setting: str | Sequence[str]) -> str:
    """Return the first of the devices selected by `runtime.device`. Raises TavError as `choose_devices`."""
    return choose_devices(setting)[0]


def resolve_precision(setting: str, device: str) -> str:
    """Return the precision that a setting means on a device.

    `auto` is bfloat16 on GPUs and x86 CPUs that multiply matrices in it, which is about twice as fast, and float32 elsewhere:
    without such instructions, bfloat16 is emulated and slower.
    """
    if setting != "auto":
        return setting
    return "bfloat16" if multiplies_in_bfloat16(device) else "float32"


def multiplies_in_bfloat16(device: str) -> bool:
    """Return whether a device has instructions that multiply matrices in bfloat16."""
    import torch

    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Older torch does not tell.
    able: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)() if kind == "cpu" else {}
    return any(able.get(name) for name in ("amx_bf16", "avx512_bf16"))


def gpu_identity(device: str) -> str | None:
    """Return an identity of a GPU that is the same in every process of this machine; None for a CPU."""
    kind, _, index = device.partition(":")
    if kind == "cpu":
        return None
    if kind != "cuda":
        return f"{platform.node()}-{kind}"
    import torch

    number = int(index) if index else torch.cuda.current_device()
    return str(getattr(torch.cuda.get_device_properties(number), "uuid", f"{platform.node()}-{number}"))


class _GpuLocks:
    """Locks between processes, one for each GPU, shared by all slots of this process.

    The lock of a GPU is a file in the folder TAV_LOCKS (default: the system's for temporary files) that all projects,
    entry points and containers of a machine share. It is released when the process ends, however it ends.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._held: dict[Path, tuple[int, int]] = {}  # descriptor, and number of slots

    def acquire(self, path: Path) -> bool:
        """Lock a GPU; False if another process holds it."""
        with self._mutex:
            if path in self._held:
                descriptor, slots = self._held[path]
                self._held[path] = descriptor, slots + 1
                return True
            descriptor = _open_lock_file(path)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BaseException as error:
                os.close(descriptor)
                if isinstance(error, BlockingIOError):
                    return False
                raise
            self._held[path] = descriptor, 1
            return True

    def release(self, path: Path) -> None:
        """Let other processes have the GPU, once no slot of this process holds it."""
        with self._mutex:
            descriptor, slots = self._held.pop(path)
            if slots > 1:
                self._held[path] = descriptor, slots - 1
            else:
                os.close(descriptor)


_gpu_locks = _GpuLocks()


class Slot:
    """One device of a pool, while a stage holds it.

    Attributes:
        device: its name, as torch knows it.
        resident: objects that stay on the device between two holders, such as a loaded model, by name.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.resident: dict[str, Any] = {}
        self._locked: Path | None = None

    def try_lock(self) -> Path | None:
        """Lock the GPU for this process; return its lock file if another process holds it."""
        identity = gpu_identity(self.device)
        if identity is None or self._locked is not None:
            return None
        path = _lock_path(identity)
        if not _gpu_locks.acquire(path):
            return path
        self._locked = path
        return None

    def release(self) -> None:
        """Drop what is resident, return its memory, and let other processes have the GPU."""
        self.resident.clear()
        if self._locked is not None:
            release_memory()
            _gpu_locks.release(self._locked)
            self._locked = None


class DevicePool:
    """Devices that stages hold one at a time, within this process and, for GPUs, on this machine.

    Args:
        devices: names for torch; a name may occur several times.
        exclusive: False if something else hands out shares of the devices, such as Ray: then every `hold` returns the
            first device at once.
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
    def hold(
        self, priority: int = 0, prefer: str | None = None, check: Callable[[], None] | None = None
    ) -> Iterator[Slot]:
        """Hold one of the devices, waiting for it if necessary.

        Args:
            priority: among those that wait, the lowest is first; then whoever came first.
            prefer: take a free device on which this is resident, if there is one.
            check: called while waiting; raises an exception to stop it.

        Raises:
            TavError: the lock file of a GPU cannot be made.
        """
        if not self.exclusive:
            yield Slot(self.devices[0])
            return
        slot = self._take(priority, prefer, check)
        try:
            yield slot
        finally:
            if not slot.resident:
                slot.release()
            with self._changed:
                self._free.append(slot)
                self._changed.notify_all()

    def _take(self, priority: int, prefer: str | None, check: Callable[[], None] | None) -> Slot:
        with self._changed:
            self._tickets += 1
            ticket = (priority, self._tickets)
            self._waiting.append(ticket)
            warned = False
            try:
                while True:
                    if check is not None:
                        check()
                    if min(self._waiting) == ticket and self._free:
                        slot, locked = self._lock_one(prefer)
                        if slot is not None:
                            break
                        if not warned:
                            logger.warning("waiting for a GPU that another process uses (%s)", locked)
                            warned = True
                    self._changed.wait(POLL_SECONDS)
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()
        if prefer not in slot.resident:
            slot.resident.clear()
        return slot

    def _lock_one(self, prefer: str | None) -> tuple[Slot | None, Path | None]:
        """Return a free slot whose GPU is locked for this process, or the lock file that another process holds."""
        locked = None
        # The preferred device first, then one that is empty rather than one whose model would have to go.
        for slot in sorted(self._free, key=lambda slot: (prefer not in slot.resident, bool(slot.resident))):
            locked = slot.try_lock()
            if locked is None:
                self._free.remove(slot)
                return slot, None
        return None, locked

    def drop(self, resident: str) -> None:
        """Remove a resident object from all free devices; GPUs left empty are then free for other processes."""
        with self._changed:
            for slot in self._free:
                if slot.resident.pop(resident, None) is not None and not slot.resident:
                    slot.release()


def _lock_path(name: str) -> Path:
    folder = Path(os.environ.get("TAV_LOCKS") or tempfile.gettempdir())
    return folder / f"tav-{re.sub(r'[^A-Za-z0-9-]+', '-', name)}.lock"


def _open_lock_file(path: Path) -> int:
    """Open a lock file, which every user of the machine can lock. A link is never followed.

    In a sticky folder, another user's file cannot be opened with O_CREAT.
    """
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        try:
            return os.open(path, os.O_RDONLY | flags)
        except FileNotFoundError:
            descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | flags, 0o644)
            os.fchmod(descriptor, 0o644)  # whatever the umask
            return descriptor
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
