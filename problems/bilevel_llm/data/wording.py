"""How messages to people describe data."""

from collections.abc import Mapping
from typing import Any


def kind_of(value: Any) -> str:
    """What JSON calls a value, with its article."""
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "a list"
        case dict():
            return "an object"
        case _:
            return getattr(value, "kind", None) or f"a {type(value).__name__}"


def names_of_fields(fields: Mapping[str, Any]) -> str:
    """The names of the fields of an object, for a list in a sentence."""
    return ", ".join(fields) or "no fields"
