"""Whether code that a model brings may run. Only whoever starts the program can say so, never a file that it reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from bilevel.errors import InputError

OPTION = "--trust-remote-code"

_trusted: ContextVar[bool] = ContextVar("trusted", default=False)


@contextmanager
def trusting_remote_code(trusted: bool = True) -> Iterator[None]:
    """Within this context, code that a model directory brings is run. The option `--trust-remote-code` enters it."""
    token = _trusted.set(trusted)
    try:
        yield
    finally:
        _trusted.reset(token)


def remote_code_is_trusted(*, asked_by: str | None = None) -> bool:
    """Whether such code may run.

    asked_by: the file or key that asks for it, if one does. Raises `InputError`, naming it, if it may not: a recipe may have
    been written by anybody.
    """
    if asked_by is not None and not _trusted.get():
        raise InputError(
            f"{asked_by} asks to run code that the model brings; if you trust its author, allow it on the command line: "
            f"{OPTION} (from Python: bilevel.trust.trusting_remote_code)"
        )
    return _trusted.get()
