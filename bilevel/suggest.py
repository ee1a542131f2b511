"""Guess which known name a misspelled one was meant to be."""

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like `name`; None if none is like it."""
    return next(iter(get_close_matches(name, list(known), n=1)), None)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """What to append to a message about an unknown name: the nearest known name, or else all of them."""
    known = list(known)
    near = nearest(name, known)
    return f"; did you mean {near!r}?" if near is not None else f"; known: {', '.join(known)}"
