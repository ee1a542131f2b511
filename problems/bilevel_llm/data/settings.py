"""Where data comes from, as a recipe says it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite

from bilevel_llm.data.registered_formats import FormatName


@dataclass(frozen=True)
class Source:
    """A source of training data.

    name: what its weight is called.
    path: a file, a directory, a glob, or a list of them.
    format: how a row is written: the name of a registered format; None detects it from the first row of each file.
    """

    name: str
    path: str | list[str]
    format: FormatName | None = None

    @property
    def patterns(self) -> list[str]:
        """Its paths and globs."""
        return patterns_of(self.path)


@dataclass(frozen=True)
class ValidationSet:
    """Rows that training should serve. `weight` is the set's part of the upper loss, relative to the other sets."""

    path: str | list[str]
    name: str = "validation"
    format: FormatName | None = None
    weight: float = 1.0

    @property
    def patterns(self) -> list[str]:
        """Its paths and globs."""
        return patterns_of(self.path)


def patterns_of(path: str | list[str]) -> list[str]:
    """A recipe's `path` as a list: it may be a single one."""
    return [path] if isinstance(path, str) else path


def check_sources(sources: Sequence[Source]) -> None:
    """Raise `ValueError` if there is none, or if two have the same name."""
    names = [source.name for source in sources]
    if not names:
        raise ValueError("sources: at least one is needed")
    for position, name in enumerate(names):
        if name in names[:position]:
            raise ValueError(f"sources: the name {name!r} is used twice; give every source a name of its own")


def check_set_weights(sets: Sequence[ValidationSet]) -> None:
    """Raise `ValueError` for a weight that makes no sense."""
    if not all(v.weight > 0 and isfinite(v.weight) for v in sets):
        raise ValueError("validation: every weight must be positive and finite")


def unique_names(sets: Iterable[ValidationSet]) -> list[str]:
    """A name for each set: its own, with a number behind it where another set has taken that already."""
    names: list[str] = []
    for validation_set in sets:
        name, number = validation_set.name, 1
        while name in names:
            number += 1
            name = f"{validation_set.name}-{number}"
        names.append(name)
    return names
