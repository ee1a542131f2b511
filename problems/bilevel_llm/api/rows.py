"""Rows that are held in memory, written to a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from bilevel.errors import InputError

KNOWN = (
    "a path or a list of paths, a list of dictionaries, a datasets.Dataset or IterableDataset, or a pandas, polars or "
    "pyarrow table"
)

BATCH = 1024  # rows that are held at once

Write = Callable[[Path], int]
"""Writes the rows to a file, and says how many they are."""


def kind_of(value: Any) -> str:
    """What a value is, for messages: its class, with the package that it comes from."""
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__.partition('.')[0]}.{kind.__name__}"


def rows_writer(rows: Any, argument: str, max_rows: int | None) -> tuple[str, Write]:
    """How to write rows to a file: its ending, and what writes it.

    argument: what the rows are called, for messages. max_rows: how many to take of a stream.

    Raises `InputError`, naming the argument, for what does not hold rows; so does the writing for rows that are no rows.
    """
    datasets = sys.modules.get("datasets")
    if datasets is not None:
        if isinstance(rows, datasets.DatasetDict | datasets.IterableDatasetDict):
            splits = list(rows)
            raise InputError(f"{argument} holds the splits {', '.join(splits)}; give one, as in dataset[{splits[0]!r}]")
        if isinstance(rows, datasets.Dataset):
            return ".parquet", lambda file: _write_dataset(rows, file)
        if isinstance(rows, datasets.IterableDataset):
            if max_rows is None:
                raise InputError(
                    f"{argument} is a stream, which may have no end: give max_rows, of which the first of the stream are "
                    "taken (shuffle it before: dataset.shuffle(buffer_size=10_000))"
                )
            return ".jsonl", lambda file: _write_lines(islice(rows, max_rows), argument, file)
    if hasattr(rows, "__arrow_c_stream__") or type(rows).__module__.partition(".")[0] == "pandas":
        return ".parquet", lambda file: _write_table(rows, argument, file)
    if isinstance(rows, list | tuple):
        return ".jsonl", lambda file: _write_lines(rows, argument, file)
    raise InputError(f"{argument} is {article(kind_of(rows))}; give {KNOWN}")


def article(words: str) -> str:
    """The words with their article."""
    return f"{'an' if words[:1].lower() in 'aeiou' else 'a'} {words}"


def _write_dataset(dataset: Any, file: Path) -> int:
    from pyarrow.parquet import ParquetWriter

    with ParquetWriter(file, dataset.features.arrow_schema) as writer:
        for batch in dataset.with_format("arrow").iter(BATCH):
            writer.write_table(batch)
    return len(dataset)


def _write_table(rows: Any, argument: str, file: Path) -> int:
    import pyarrow
    from pyarrow import parquet

    try:
        table = pyarrow.table(rows) if hasattr(rows, "__arrow_c_stream__") else pyarrow.Table.from_pandas(rows)
    except (pyarrow.ArrowException, TypeError, ValueError) as error:  # a column of different types, names that are no text
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{argument}: this {kind_of(rows)} cannot be written as a table: {reason}") from error
    parquet.write_table(table, file)
    return int(table.num_rows)


def _write_lines(rows: Iterable[Any], argument: str, file: Path) -> int:
    number = 0
    with file.open("w", encoding="utf-8") as lines:
        for number, row in enumerate(rows, start=1):
            where = f"{argument}[{number - 1}]"
            if not isinstance(row, Mapping):
                raise InputError(f"{where} is {article(kind_of(row))}; every row is a dictionary, such as {{'text': ...}}")
            try:
                lines.write(json.dumps(dict(row), ensure_ascii=False, allow_nan=False) + "\n")
            except (
                TypeError,
                ValueError,
                RecursionError,
            ) as error:  # a set, NaN, half a surrogate pair; what contains itself
                raise InputError(
                    f"{where} cannot be written as JSON: {error}; a row holds text, numbers, lists and dictionaries"
                ) from error
    return number
