"""Settings that are given in Python are held to what a recipe's are: the types and ranges that their class states."""

from __future__ import annotations

import builtins
import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, get_type_hints

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError, PydanticUndefinedAnnotation, PydanticUserError

from bilevel.errors import InputError


class Checked:
    """A base of classes whose subclasses are dataclasses of settings. Each is checked before its own `__post_init__`.

    What a recipe may write in short, such as a mapping for an object, becomes here what it becomes in a recipe.

    Raises `InputError` with a line for each field that is wrong, naming class, field and value. A field whose annotation
    pydantic does not understand is not checked.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = cls.__dict__.get("__post_init__")
        if own is not None:
            cls.__post_init__ = _after_a_check(own)  # type: ignore[method-assign]

    def __post_init__(self) -> None:
        """Check the fields. A subclass's own does so first, whether or not it calls this."""
        check_settings(self)


def check_settings(part: object) -> None:
    """Check the fields of a dataclass, and convert them as pydantic does; see `Checked`."""
    wrong = []
    for name, adapter in _adapters(type(part)).items():  # type: ignore[arg-type]  # a class is hashable
        value = getattr(part, name)
        try:
            checked = adapter.validate_python(value.item() if isinstance(value, np.generic) else value)
        except ValidationError as error:
            wrong.append(f"{type(part).__name__}.{name} is {value!r}: {_reason(error)}")
        else:
            object.__setattr__(part, name, checked)  # the class may be frozen
    if wrong:
        raise InputError("\n".join(wrong))


def _reason(error: ValidationError) -> str:
    """What is wrong, as far inside the value as it is known: a union says it for each of its types."""
    item = max(error.errors(), key=lambda item: len(item["loc"]))
    inside = f" ({'.'.join(map(str, item['loc']))})" if item["loc"] else ""
    return item["msg"].removeprefix("Value error, ") + inside


def _after_a_check(own: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(own)
    def checked(self: object, *args: Any) -> None:
        check_settings(self)
        own(self, *args)

    return checked


@functools.cache
def _adapters(kind: type) -> dict[str, TypeAdapter[Any]]:
    """What checks each field of the class; nothing if it is no dataclass."""
    if not dataclasses.is_dataclass(kind):
        return {}
    adapters = {field.name: _adapter(kind, field.name) for field in dataclasses.fields(kind) if field.init}
    return {name: adapter for name, adapter in adapters.items() if adapter is not None}


def _adapter(kind: type, name: str) -> TypeAdapter[Any] | None:
    """What checks a field; None if its annotation exists for type checkers alone, or says nothing that can be checked."""
    owner = next(base for base in kind.__mro__ if name in inspect.get_annotations(base))
    alone = SimpleNamespace(__annotations__={name: inspect.get_annotations(owner)[name]})
    with suppress(NameError, TypeError, PydanticSchemaGenerationError, PydanticUndefinedAnnotation):
        names = vars(sys.modules.get(owner.__module__, builtins))
        annotation = get_type_hints(alone, globalns=names, localns=dict(vars(owner)), include_extras=True)[name]
        try:
            return TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
        except PydanticUserError:  # a dataclass has its own configuration
            return TypeAdapter(annotation)
    return None
