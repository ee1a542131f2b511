"""Where data comes from, as a recipe says it."""

from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from math import isfinite
from pathlib import Path

from bilevel.errors import InputError
from bilevel_llm.data.columns import columns_of
from bilevel_llm.data.places import find_places
from bilevel_llm.data.registered_formats import FormatName


class DataSet:
    """Rows of data: where they are, and how they are read. Everything that reads rows takes one. Subclasses are dataclasses.

    path: a file, a directory, a glob, a data set of the Hugging Face hub (`owner/name`), files of one
        (`hf://datasets/owner/name/FILE`), or a list of them.
    format: how a row is written: the name of a registered format; None detects it from the first row of each file.
    fields: what the user's columns are, as in {prompt: question, response: answer}: role -> column. The roles are prompt,
        response, input, system, messages and text; the names of the format's own fields are known too. Only these columns
        are read. None: the columns have the names that the format knows.
    max_rows: the most rows that are read: a random sample of them, all equally likely. None: all rows.
    sample_seed: which sample that is; None is 0. It does not depend on `run.seed`, so that runs of several seeds share data.
    split, subset: of a data set of the hub, split also of one that `datasets` saved; None takes the only one.
    """

    path: str | list[str]
    format: FormatName | None
    fields: dict[str, str] | None
    max_rows: int | None
    sample_seed: int | None
    split: str | None
    subset: str | None

    def __post_init__(self) -> None:
        """Check what needs no file. Raises `ValueError` naming the key."""
        if not self.path or "" in self.patterns:
            raise ValueError("path is empty; name a file, a glob, or a data set of the hub")
        if self.max_rows is not None and self.max_rows < 1:
            raise ValueError(f"max_rows must be at least 1, not {self.max_rows}")
        if self.sample_seed is not None and self.sample_seed < 0:
            raise ValueError(f"sample_seed must not be negative, and is {self.sample_seed}")
        try:
            columns_of(self.fields, self.format)
        except InputError as error:
            raise ValueError(str(error)) from error

    @property
    def patterns(self) -> list[str]:
        """Its paths and globs."""
        return [self.path] if isinstance(self.path, str) else self.path

    def files(self) -> list[Path]:
        """Its files, each once. Raises `InputError` as `find_places` does."""
        return find_places(self.patterns, self.split, self.subset)


@dataclass(frozen=True)
class DataFiles(DataSet):
    """A set of rows without a name. See `DataSet` for its fields."""

    path: str | list[str]
    format: FormatName | None = None
    _: KW_ONLY
    fields: dict[str, str] | None = None
    max_rows: int | None = None
    sample_seed: int | None = None
    split: str | None = None
    subset: str | None = None


@dataclass(frozen=True)
class Source(DataSet):
    """A source of training data. See `DataSet` for its other fields.

    name: what its weight is called.
    """

    name: str
    path: str | list[str]
    format: FormatName | None = None
    _: KW_ONLY
    fields: dict[str, str] | None = None
    max_rows: int | None = None
    sample_seed: int | None = None
    split: str | None = None
    subset: str | None = None


@dataclass(frozen=True)
class ValidationSet(DataSet):
    """Rows that training should serve. See `DataSet` for its other fields.

    weight: the set's part of the upper loss, relative to the other sets.
    """

    path: str | list[str]
    name: str = "validation"
    format: FormatName | None = None
    weight: float = 1.0
    _: KW_ONLY
    fields: dict[str, str] | None = None
    max_rows: int | None = None
    sample_seed: int | None = None
    split: str | None = None
    subset: str | None = None


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
