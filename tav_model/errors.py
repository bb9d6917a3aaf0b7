"""The errors that are no fault of the program: the input is wrong, or the disk is full; and what to change."""


class TavError(Exception):
    """A mistake in what the user gave: a file, a parameter, a prompt, a set of weights.

    The message is one line that says what is wrong, where, and what is allowed. Command lines print it
    after ``error:`` and exit with status 2, without a traceback; nothing retries it.
    """


class FullDiskError(OSError):
    """The disk is full. `filename` is what could not be written, `strerror` says how much room there is."""

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


def first_line(error: object) -> str:
    """Return the first line of an error's message, or the name of its type where the message is empty."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
