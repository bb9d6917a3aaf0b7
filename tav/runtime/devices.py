"""The device that a stage computes on: chosen, not shared by accident, and what to do when its memory does not suffice."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from tav_model.errors import TavError

Result = TypeVar("Result")
POLL_SECONDS = 0.5

logger = logging.getLogger(__name__)


def choose_device(name: str) -> str:
    """`auto` is the GPU where there is one.

    Raises:
        TavError: a device that this machine does not have.
    """
    # CUDA's matrix products give the same bits each time only with this workspace.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        first = str(error).partition("\n")[0]
        raise TavError(f"params.yaml: runtime.device: {name!r} is not usable here ({first})") from None
    # As use_deterministic_algorithms, which besides imports what compiles: a second for each stage.
    torch.set_deterministic_debug_mode("warn")
    return name


def gpu_name(device: str) -> str | None:
    """What tells this GPU from every other one, whatever number it has for this process; None for a CPU."""
    kind, _, index = device.partition(":")
    if kind == "cpu":
        return None
    if kind != "cuda":
        return f"{platform.node()}-{kind}"
    import torch

    number = int(index) if index else torch.cuda.current_device()
    return str(getattr(torch.cuda.get_device_properties(number), "uuid", f"{platform.node()}-{number}"))


@contextlib.contextmanager
def exclusive_gpu(device: str) -> Iterator[None]:
    """Hold the GPU for this process, waiting while another has it; on a CPU, nothing.

    The lock is a file in the folder TAV_LOCKS (default: the system's for temporary files) that all projects and doors of
    a machine share. It goes with the process, however that ends.

    Raises:
        TavError: the lock's file cannot be made.
    """
    name = gpu_name(device)
    if name is None:
        yield
        return
    path = (
        Path(os.environ.get("TAV_LOCKS") or tempfile.gettempdir()) / f"tav-{re.sub(r'[^A-Za-z0-9-]+', '-', name)}.lock"
    )
    try:
        file = _open(path)
    except OSError as error:
        raise TavError(f"{path}: cannot be opened ({error.strerror}); set TAV_LOCKS to a folder of your own") from None
    try:
        told = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    logger.warning("waiting for the GPU %s, which another process works on (%s)", name, path)
                    told = True
                time.sleep(POLL_SECONDS)
        yield
    finally:
        os.close(file)


def _open(path: Path) -> int:
    """Another user's file can be locked, but not opened with O_CREAT in a sticky folder; a link is never followed."""
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, os.O_RDONLY | flags)
    except FileNotFoundError:
        return os.open(path, os.O_RDONLY | os.O_CREAT | flags, 0o644)


def is_out_of_memory(error: BaseException) -> bool:
    """Of the GPU or of the machine."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in said or "can't allocate memory" in said)
    )


def retry_with_smaller_batch(action: Callable[[int], Result], size: int, what: str) -> tuple[Result, int]:
    """What `action(size)` gives, at half the size each time that memory does not suffice; and the size that did.

    Raises:
        Exception: what the action raises; out of memory, when even a size of 1 is too much.
    """
    while True:
        try:
            return action(size), size
        except Exception as error:
            if not is_out_of_memory(error) or size <= 1:
                raise
            reason = str(error).partition("\n")[0] or type(error).__name__
        # Out of the handler, which holds the frames of the call and all their tensors.
        size //= 2
        release_memory()
        logger.warning("out of memory (%s): going on with %s of %d", reason, what, size)


def release_memory() -> None:
    """Give back to the GPU what the process holds of it without need."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
