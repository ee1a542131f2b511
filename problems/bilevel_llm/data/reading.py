"""Data files -> rows of turns: files are read by `files`, and what the fields of a row mean is up to its `Format`.

Rows are read one by one: no file is ever held in memory.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bilevel.errors import InputError
from bilevel_llm.data.columns import columns_of
from bilevel_llm.data.files import OnBad, Watch, find_files, pass_over, raise_it, read_objects, unwatched
from bilevel_llm.data.format import Format
from bilevel_llm.data.layout import Layout
from bilevel_llm.data.meaning import refuse
from bilevel_llm.data.registered_formats import Formats, registered_formats
from bilevel_llm.data.rows import Row, Turn
from bilevel_llm.data.settings import DataSet
from bilevel_llm.data.wording import kind_of

OnBadRow = Literal["error", "skip"]
"""What to do with a row that cannot be used: stop; or leave it out, and count and list what was left out."""


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as its file has it.

    fields: every field, those that are ignored included; if the recipe names columns, those alone, by the format's names.
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
        refuse(self.fields, self.format.refused, where)
        turns = self.format.read(self.fields, where)
        learned = False
        for turn in turns:
            if turn.learned:
                learned = True
        if not learned:
            raise self._nothing_learned(turns)
        return Row(turns, where)

    def _nothing_learned(self, turns: Sequence[Turn]) -> InputError:
        said = ", ".join(f"{turn.role}, not to be learned" if turn.masked else turn.role for turn in turns) or "none at all"
        return InputError(f"{self.where}: no assistant turn to learn from (turns: {said}); remove the row or complete it")


def read_rows(patterns: Sequence[str], *, format: str | None = None, formats: Formats | None = None) -> list[Row]:
    """Read all rows of the files that `patterns` name, in the order of `find_files`, into a list; see `each_row`."""
    return [row for path in find_files(patterns) for row in each_row(path, format, formats)]


def each_row(
    path: Path,
    format: str | None = None,
    formats: Formats | None = None,
    on_bad: OnBad = raise_it,
    fields: Mapping[str, str] | None = None,
    watch: Watch = unwatched,
) -> Iterator[Row]:
    """The rows of one file or saved data set, one by one.

    format: name of a format; None detects it from each file's first row.
    formats: those that are known; None takes all that plugins have registered.
    on_bad: called with what is wrong with a row, or a line, that cannot be used; if it returns, the row is left out.
    fields: role -> column, where the columns have other names than the format's (see `columns_of`).
    watch: is told how far the file has been read.

    Raises `InputError` for whatever cannot be read, naming file, line and field: no such file, no match, an unknown
    type of file, an empty file, bytes that are not UTF-8, malformed JSON, a row that is not an object, lacks a field of
    its format, has one of the wrong type, or one that would change its meaning and is not read, an unknown role or format, a
    first row in no format or in several, a conversation without an assistant turn.
    """
    return turned(read_raw_rows(path, format, formats, on_bad, fields, watch), on_bad)


def turned(rows: Iterable[RawRow], on_bad: OnBad = raise_it) -> Iterator[Row]:
    """The turns of the rows, one by one. on_bad: called with what is wrong with one; if it returns, the row is left out."""
    for raw in rows:
        try:
            row = raw.row()
        except InputError as error:
            on_bad(error)
        else:
            yield row


def read_raw_rows(
    path: Path,
    format: str | None = None,
    formats: Formats | None = None,
    on_bad: OnBad = raise_it,
    fields: Mapping[str, str] | None = None,
    watch: Watch = unwatched,
) -> Iterator[RawRow]:
    """The rows of one file or saved data set, unchanged; of those that `fields` describes, what it names.

    Raises `InputError` as `each_row`, but for what turns hold.
    """
    known = formats or registered_formats()
    columns = columns_of(fields, format, known)
    chosen = columns.format if columns is not None else known.find(format) if format is not None else None
    empty = True
    seen: set[str] = set()
    last: Mapping[str, Any] = {}

    def leave_out(error: InputError) -> None:
        nonlocal empty
        empty = False
        on_bad(error)

    for number, row in read_objects(path, leave_out, watch):
        empty = False
        where = f"{path}:{number}"
        try:
            if not isinstance(row, dict):
                raise InputError(f"{where}: the row is {kind_of(row)}; every row must be an object, {{...}}")
            if columns is not None:
                last, row = row, columns.pick(row, where)
                seen.update(row)
            if chosen is None:
                chosen = known.detect(row, where)
            if not chosen.fits(row):
                raise known.misfit(chosen, row, where)
        except InputError as error:
            on_bad(error)
        else:
            yield RawRow(row, chosen, path, number)
    if columns is not None and seen:
        columns.check_seen(seen, path, last)
    if empty:
        raise InputError(f"{path}: the file holds no rows; remove it from the list of files or fill it")


def first_rows(data: DataSet, on_bad: OnBad = raise_it) -> list[RawRow]:
    """The first row of each file of a source."""
    return [row for path in data.files() for row in _first(read_raw_rows(path, data.format, None, on_bad, data.fields))]


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


def reading_again(policy: OnBadRow) -> OnBad:
    """What to do with bad rows of files that have been read before: those that are left out have been counted and listed."""
    return raise_it if policy == "error" else pass_over


def _first(rows: Iterator[RawRow]) -> list[RawRow]:
    return [row for row in (next(rows, None),) if row is not None]
