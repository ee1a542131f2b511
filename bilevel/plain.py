"""Settings as plain data, which YAML and JSON can hold and by which two recipes can be compared."""

import dataclasses
from collections.abc import Mapping
from typing import Any

RECIPE_RULES: Mapping[str, Any] = {"arbitrary_types_allowed": True}
"""How pydantic builds a part from a recipe: a field of any type may exist if it has a default.

That no key is ignored is seen to where parts are built, for all classes alike.
"""


def to_plain(value: Any) -> Any:
    """Convert dataclasses to mappings of their settable fields, and functions and other objects to their names."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, Mapping):
        return {str(key): to_plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(entry) for entry in value]
    if isinstance(value, str | int | float | bool | None):
        return value
    return name_of(value) if callable(value) else str(value)


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
