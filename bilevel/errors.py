"""The errors that are meant for people to read."""


class BilevelError(Exception):
    """Base of the errors whose message alone should be enough; the command line prints it without a traceback."""


class InputError(BilevelError):
    """Something that the user gave cannot be used (exit code 2). Says what, where (file, line, key) and what to do."""


class ProblemError(InputError):
    """A problem or solver is written wrongly: its author has to correct it. Says which method, and what it has to do."""


class DamagedError(InputError):
    """A file that this package has written is no longer as it was written. Names the file, and the line or key."""


class RunError(BilevelError):
    """A run that had started cannot continue (exit code 1)."""


class NonFiniteError(RunError):
    """A loss, gradient or variable became NaN or infinite. The message names it.

    variable: the name of the variable whose steps have most likely led there; None if that cannot be told.
    moved: whether any variable had taken a step before; if not, it is the data or the start.
    """

    def __init__(self, message: str, *, variable: str | None = None, moved: bool = True) -> None:
        super().__init__(message)
        self.variable = variable
        self.moved = moved
