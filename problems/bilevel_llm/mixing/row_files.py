"""Rows -> a JSONL or Parquet file, in one go."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilevel.errors import InputError

if TYPE_CHECKING:
    import pyarrow

SUFFIXES = (".jsonl", ".parquet")
_BATCH = 4096  # rows of a Parquet row group, and held in memory at once

Rows = Callable[[], Iterable[Mapping[str, Any]]]
"""Starts a walk through the rows; Parquet takes two, one to learn the types."""


def check_output(path: Path, *others: Path) -> None:
    """Raises `InputError` for an unknown ending, and if this or one of the other files to be written exists."""
    if path.suffix not in SUFFIXES:
        raise InputError(f"output {path}: unknown type of file {path.suffix!r}; known: {', '.join(SUFFIXES)}")
    for file in (path, *others):
        if file.exists():
            raise InputError(f"output {file} exists, and nothing is overwritten; name another file or remove it")
    if path.parent.exists() and not path.parent.is_dir():
        raise InputError(f"output {path}: {path.parent} is a file; name a directory")


def check_json(where: str, fields: Mapping[str, Any]) -> None:
    """Raises `InputError` if JSON cannot hold a row of a Parquet file or saved data set."""
    for name, value in fields.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise InputError(f"{where}: JSON cannot hold the field {name!r} ({error}); name a .parquet output") from error


def write_rows(path: Path, suffix: str, rows: Rows) -> None:
    """Write all rows as a file of this type.

    A Parquet file has every field of every row: where a row lacks a field, it is null.

    Raises `InputError` if the rows do not fit into such a file.
    """
    (_write_parquet if suffix == ".parquet" else _write_jsonl)(path, rows)


def _write_jsonl(path: Path, rows: Rows) -> None:
    with path.open("wb") as file:
        for number, row in enumerate(rows(), start=1):
            try:
                file.write(_json_line(row))
            except (TypeError, ValueError):
                check_json(f"row {number} of the mix ({row.get('_bilevel')})", row)
                raise


def _json_line(row: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair, in a field that nobody reads: as an escape it survives
        return json.dumps(row).encode() + b"\n"


def _write_parquet(path: Path, rows: Rows) -> None:
    from pyarrow import ArrowException, unify_schemas
    from pyarrow.parquet import ParquetWriter

    try:
        schema = unify_schemas([table.schema for table in _tables(rows())], promote_options="permissive")
        with ParquetWriter(path, schema) as writer:
            for table in _tables(rows(), schema):
                writer.write_table(table)
    except (ArrowException, ValueError, TypeError, OverflowError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"a Parquet file cannot hold these rows ({reason}); name a .jsonl output") from error


def _tables(rows: Iterable[Mapping[str, Any]], schema: pyarrow.Schema | None = None) -> Iterator[pyarrow.Table]:
    """Batches of rows as tables. Without a schema, each has the fields and types of its own rows."""
    import pyarrow

    walk = iter(rows)
    while batch := list(islice(walk, _BATCH)):
        names = schema.names if schema is not None else list(dict.fromkeys(name for row in batch for name in row))
        columns = []
        for name in names:
            values = [row.get(name) for row in batch]
            try:
                columns.append(pyarrow.array(values, type=schema.field(name).type if schema is not None else None))
            except (pyarrow.ArrowException, ValueError, TypeError, OverflowError) as error:
                raise ValueError(f"field {name!r}: {error}") from error
        yield pyarrow.table(columns, names=names)
