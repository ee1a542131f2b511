"""Data files -> rows of turns: files are read by `files`, and what the fields of a row mean is up to its `Format`."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bilevel.errors import InputError
from bilevel_llm.data.files import find_files, read_objects
from bilevel_llm.data.format import Format
from bilevel_llm.data.layout import Layout
from bilevel_llm.data.registered_formats import Formats, registered_formats
from bilevel_llm.data.rows import Row
from bilevel_llm.data.wording import kind_of


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as its file has it.

    fields: every field, those that are ignored included.
    format: how it is to be read.
    file, number: the file, and the row's number in it, which is that of `Row.where`.
    """

    fields: Mapping[str, Any]
    format: Format
    file: Path
    number: int

    @property
    def where(self) -> str:
        """As `Row.where`."""
        return f"{self.file}:{self.number}"

    @property
    def layout(self) -> Layout:
        """In which fields its turns are."""
        return self.format.layout(self.fields)

    def row(self) -> Row:
        """Its turns. Raises `InputError` as `read_rows` does."""
        where = self.where
        turns = self.format.read(self.fields, where)
        learned = False
        for turn in turns:
            if turn.learned:
                learned = True
        if not learned:
            raise self._nothing_learned([turn.role for turn in turns])
        return Row(turns, where)

    def _nothing_learned(self, roles: Sequence[str]) -> InputError:
        said = ", ".join(roles) or "none at all"
        return InputError(f"{self.where}: no assistant turn to learn from (turns: {said}); remove the row or complete it")


def read_rows(patterns: Sequence[str], *, format: str | None = None, formats: Formats | None = None) -> list[Row]:
    """Read all rows of the files that `patterns` name, in the order of `find_files`.

    format: name of a format; None detects it from each file's first row.
    formats: those that are known; None takes all that plugins have registered.

    Raises `InputError` for whatever cannot be read, naming file, line and field: no such file, no match, an unknown
    type of file, an empty file, bytes that are not UTF-8, malformed JSON, a row that is not an object, lacks a field of
    its format or has one of the wrong type, an unknown role or format, a first row in no format or in several, a
    conversation without an assistant turn.
    """
    return [row for path in find_files(patterns) for row in read_file(path, format, formats)]


def read_file(path: Path, format: str | None = None, formats: Formats | None = None) -> list[Row]:
    """The rows of one file or saved data set. See `read_rows`."""
    return [raw.row() for raw in read_raw_rows(path, format, formats)]


def read_raw_rows(path: Path, format: str | None = None, formats: Formats | None = None) -> Iterator[RawRow]:
    """The rows of one file or saved data set, unchanged. Raises `InputError` as `read_rows`, but for what turns hold."""
    known = formats or registered_formats()
    chosen = known.find(format) if format is not None else None
    empty = True
    for number, fields in read_objects(path):
        if not isinstance(fields, dict):
            raise InputError(f"{path}:{number}: the row is {kind_of(fields)}; every row must be an object, {{...}}")
        if chosen is None:
            chosen = known.detect(fields, f"{path}:{number}")
        if not chosen.fits(fields):
            raise known.misfit(chosen, fields, f"{path}:{number}")
        yield RawRow(fields, chosen, path, number)
        empty = False
    if empty:
        raise InputError(f"{path}: the file holds no rows; remove it from the list of files or fill it")


def first_rows(patterns: Sequence[str], format: str | None, formats: Formats | None = None) -> list[RawRow]:
    """The first row of each file of a source."""
    return [next(read_raw_rows(path, format, formats)) for path in find_files(patterns)]


def common_layout(rows: Iterable[RawRow]) -> Layout:
    """The layout that all these rows share. Raises `InputError` naming two that differ."""
    seen: dict[Layout, str] = {}
    for row in rows:
        layout = row.layout
        if layout not in seen:
            seen[layout] = f"{row.where} is {layout}"
    if len(seen) > 1:
        first, second, *_ = seen.values()
        raise InputError(f"the sources do not share one row format: {first}, but {second}; use --format messages")
    (layout,) = seen
    return layout
