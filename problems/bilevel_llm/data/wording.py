"""How messages to people describe data."""

import difflib
from collections.abc import Iterable, Mapping
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
            return f"a {type(value).__name__}"


def names_of_fields(fields: Mapping[str, Any]) -> str:
    """The names of the fields of an object, for a list in a sentence."""
    return ", ".join(fields) or "no fields"


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean ...?" with the known name that is most like this one, or nothing if none is."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
