"""Errors that are not bugs: wrong input, or a full disk. Their messages say what to change."""


class TavError(Exception):
    """Wrong input from the user: a file, a parameter, a prompt, a set of weights.

    The message is one line that says what is wrong, where, and what is allowed. Command lines print it
    after ``error:`` and exit with status 2, without a traceback; it is never retried.
    """


class FullDiskError(OSError):
    """The disk is full. `filename` could not be written; `strerror` includes the free space."""

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


def first_line(error: object) -> str:
    """Return the first line of an error's message, or the name of its type where the message is empty."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
