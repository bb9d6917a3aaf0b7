"""How the project's commands end: exit codes, and which error leads to which."""

from __future__ import annotations

from enum import IntEnum

from tav_model.errors import TavError


class ExitStatus(IntEnum):
    """The exit codes of `tav`, `python -m tasks` and `python -m flows.services`."""

    SUCCESS = 0
    FAILED = 1
    """Some clips or prompts failed, or a file could not be read or written."""
    USAGE = 2
    """What the user gave is not allowed; nothing was done."""
    INTERRUPTED = 130
    """Stopped by Ctrl-C: 128 + SIGINT, as shells report it."""


RESUMABLE = "stopped; run the same command again to resume"
"""The message of an interrupted command that keeps what it has finished."""


def explain_error(error: BaseException) -> tuple[ExitStatus, str] | None:
    """Return the exit code and the one-line message for an error that a command may end with.

    None: the error is a defect of the program, which deserves a traceback.
    """
    if isinstance(error, TavError):
        return ExitStatus.USAGE, str(error)
    if isinstance(error, OSError) and error.errno is not None:
        path = f"{error.filename}: " if error.filename else ""
        return ExitStatus.FAILED, f"{path}{error.strerror}"
    return None
