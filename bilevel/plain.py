"""Settings as plain data, which YAML and JSON can hold and by which two recipes can be compared."""

import dataclasses
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

RECIPE_RULES: Mapping[str, Any] = {"arbitrary_types_allowed": True}
"""How pydantic builds a part from a recipe: a field of any type may exist if it has a default.

That no key is ignored is seen to where parts are built, for all classes alike.
"""


_SIMPLE = (str, int, float, bool, list, tuple)
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def to_plain(value: Any) -> Any:
    """Convert dataclasses to mappings of their settable fields, functions to their names, and other objects to text.

    The same value gives the same in every process: no address in memory and no order of a set gets in.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, Mapping):
        return {str(key): to_plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(entry) for entry in value]
    if isinstance(value, str | int | float | bool | None):
        return value
    if isinstance(value, set | frozenset):
        return sorted((to_plain(entry) for entry in value), key=str)
    if isinstance(value, partial):
        return {"function": to_plain(value.func), "arguments": to_plain(value.args), **to_plain(value.keywords)}
    if _says_nothing(value):
        settings = {key: entry for key, entry in getattr(value, "__dict__", {}).items() if isinstance(entry, _SIMPLE)}
        return {"class": name_of(value), **to_plain(settings)} if settings else name_of(value)
    return name_of(value) if callable(value) else _ADDRESS.sub("", str(value))


def _says_nothing(value: Any) -> bool:
    """Whether the text of an object is that of any other of its class, and its address."""
    kind: Any = type(value)
    return not callable(value) and kind.__repr__ is object.__repr__ and kind.__str__ is object.__str__


def name_of(part: Any) -> str:
    """The import path of a function or class, or of an object's class."""
    named = part if hasattr(part, "__qualname__") else type(part)
    return f"{named.__module__}:{named.__qualname__}"


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Convert a tree of mappings and lists to a mapping of dotted keys to leaves."""
    if isinstance(tree, Mapping):
        items = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list | tuple):
        items = [(str(index), value) for index, value in enumerate(tree)]
    else:
        return {prefix: tree}
    return {k: v for key, value in items for k, v in flatten(value, f"{prefix}.{key}" if prefix else key).items()}
