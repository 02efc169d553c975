"""The two exceptions that end a run with one message; any other exception is a bug and shows its traceback."""


class UserError(ValueError):
    """Something that the user handed over cannot be used: config, data, a path. Exit status 2.

    The message says what was given, what was expected, and what to do; several errors are one per line.
    """


class RunStopped(RuntimeError):
    """A run that must not go on: the loss is nan, FP8 did not run as asked, the disk is full. Exit status 1."""
