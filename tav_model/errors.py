"""The one error that means: the input is wrong, and here is what to change."""


class TavError(Exception):
    """A mistake in what the user gave: a file, a parameter, a prompt, a set of weights.

    The message is one line that says what is wrong, where, and what is allowed. Command lines print it
    after ``error:`` and exit with status 2, without a traceback; nothing retries it.
    """
