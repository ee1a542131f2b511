"""What all commands of the command line have in common: how their options are checked, and what they may be allowed."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from bilevel.errors import InputError
from bilevel.plaintext import unprintable
from bilevel.trust import OPTION, trusting_remote_code

LARGEST = 10**12
"""A larger number of rows, tokens or steps is a slip."""

_TRUST = inspect.Parameter(
    "trust_remote_code",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[bool, typer.Option(OPTION, help="Run code that the model's directory brings.")],
)


def prepared(function: Callable[..., None], *, reads_models: bool = True) -> Callable[..., None]:
    """A command whose options are checked before it begins.

    reads_models: give it the option `--trust-remote-code` as well, which holds while it runs.

    Raises `InputError` for numbers that are not finite or too large, and for text with control characters.
    """
    signature = inspect.signature(function, eval_str=True)

    @functools.wraps(function)
    def command(**options: Any) -> None:
        trusted = options.pop(_TRUST.name) if reads_models else False
        for name, value in options.items():
            for one in value if isinstance(value, list) else [value]:
                _check(name.replace("_", "-"), one)
        with trusting_remote_code(trusted):
            function(**options)

    parameters = [*signature.parameters.values(), *([_TRUST] if reads_models else [])]
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters} | {"return": None}
    return command


def _check(name: str, value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"--{name} is {value}; give a finite number")
    if isinstance(value, int | float) and abs(value) > LARGEST:
        raise InputError(f"--{name} is larger than {LARGEST:.0e}")
    if isinstance(value, str | Path) and unprintable(str(value)):
        raise InputError(f"{name} has control characters: {str(value)!r}")
