"""Data files -> the objects that they hold, whatever the fields of these mean.

Files are `.json` (an array of objects), `.jsonl`, both also with `.gz`, `.parquet`, and directories written by
`datasets.Dataset.save_to_disk`.
"""

import glob
import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bilevel.errors import InputError
from bilevel.suggest import nearest
from bilevel_llm.data.wording import kind_of


def find_files(patterns: Sequence[str]) -> list[Path]:
    """The files that paths and globs name, each once, in the order of `patterns`; the matches of a glob are sorted.

    `~` is expanded and `**` matches any depth. A glob's matches are files and saved data sets, no other directories.

    Raises `InputError` for a path that does not exist and for a glob without a match.
    """
    found: dict[Path, Path] = {}
    for pattern in patterns:
        for path in _matches(os.path.expanduser(pattern)):
            found.setdefault(path.resolve(), path)
    if not found:
        raise InputError("no data files are named; give at least one path or glob")
    return list(found.values())


def read_objects(path: Path) -> Iterator[tuple[int, Any]]:
    """The rows of one file or saved data set, unchanged, each with its number (see `Row.where`).

    Raises `InputError`, naming file and line, for an unknown type of file, an empty file, bytes that are not UTF-8, and
    malformed JSON.
    """
    type = file_type(path)
    yield from _saved_dataset(path) if type == "directory" else _READERS[type](path)


def file_type(path: Path) -> str:
    """How a file is to be read: ".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet" or "directory".

    Raises `InputError` for any other ending, and for a directory that is not a saved data set.
    """
    if _is_saved_dataset(path):
        return "directory"
    if path.is_dir():
        raise InputError(
            f"{path}: a directory, but not one written by datasets.save_to_disk; name its files, as in {path}/*.jsonl"
        )
    name = path.name.lower()
    for ending in _READERS:
        if name.endswith(ending):
            return ending
    raise InputError(
        f"{path}: unknown type of file {path.suffix!r}; known: {', '.join(_READERS)} "
        "and directories written by datasets.save_to_disk"
    )


def _matches(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.exists():  # asked first: a plain path may contain brackets
        return [path]
    if not glob.has_magic(pattern):
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = nearest(path.name, siblings)
        guess = f"; did you mean {near!r}?" if near else ""
        raise InputError(f"no such file: {pattern} (looked up from {Path.cwd()}){guess}")
    found = [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]
    found = [path for path in found if path.is_file() or _is_saved_dataset(path)]
    if not found:
        raise InputError(f"no file matches {pattern} (looked up from {Path.cwd()}); check the folder and the ending")
    return found


def _is_saved_dataset(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        if path.name.lower().endswith(".gz"):
            data = gzip.decompress(data)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: not a whole gzip file ({error}); compress or download it again") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        text = data.decode("utf-8-sig")  # editors on Windows put a byte-order mark first
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: byte 0x{data[error.start]:02x} is not UTF-8; save it as UTF-8") from error
    if not text.strip():
        raise InputError(f"{path}: the file is empty; remove it from the list of files or fill it")
    return text


def _json_lines(path: Path) -> Iterable[tuple[int, Any]]:
    # not splitlines(): JSON strings may contain U+2028 and other characters which that takes for line ends
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise _malformed(path, number, error, "every line of this file must be one JSON object") from error


def _json_array(path: Path) -> Iterable[tuple[int, Any]]:
    text = _text(path)
    try:
        records = list(_array_elements(text, path))
    except json.JSONDecodeError as error:
        raise _malformed(path, error.lineno, error, "the file must be one JSON array of objects") from error
    lines, line, seen = [], 1, 0
    for start, _ in records:
        line += text.count("\n", seen, start)
        seen = start
        lines.append(line)
    numbers = lines if len(set(lines)) == len(lines) else range(1, len(lines) + 1)
    return zip(numbers, (record for _, record in records), strict=True)


_SPACE = re.compile(r"[ \t\r\n]*")


def _array_elements(text: str, path: Path) -> Iterable[tuple[int, Any]]:
    """The position and the value of each element of a JSON array; `json.loads` would not keep the positions."""

    def after_space(position: int) -> int:
        match = _SPACE.match(text, position)
        assert match is not None  # it matches the empty string
        return match.end()

    decoder = json.JSONDecoder()
    at = after_space(0)
    if text[at] != "[":
        value, _ = decoder.raw_decode(text, at)
        raise InputError(
            f"{path}: the file holds {kind_of(value)}, not an array of rows; "
            "put the rows into [...], or call the file .jsonl if it has one object a line"
        )
    at = after_space(at + 1)
    if not text.startswith("]", at):
        while True:
            value, end = decoder.raw_decode(text, at)
            yield at, value
            at = after_space(end)
            if not text.startswith(",", at):
                break
            at = after_space(at + 1)
    if not text.startswith("]", at):
        raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
    if after_space(at + 1) < len(text):
        raise json.JSONDecodeError("Extra data", text, after_space(at + 1))


def _parquet(path: Path) -> Iterable[tuple[int, Any]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            return enumerate(file.read().to_pylist(), start=1)
    except (ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable parquet file: {_first_line(error)}") from error


def _saved_dataset(path: Path) -> Iterable[tuple[int, Any]]:
    from datasets import DatasetDict, load_from_disk

    try:
        dataset = load_from_disk(str(path))
        if isinstance(dataset, DatasetDict):
            if len(dataset) != 1:
                splits = list(dataset)
                raise InputError(f"{path}: holds the splits {', '.join(splits)}; name one, as in {path}/{splits[0]}")
            (dataset,) = dataset.values()
        return enumerate(dataset.with_format(None).to_list(), start=1)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: not a readable saved data set: {_first_line(error)}") from error


_READERS: Mapping[str, Callable[[Path], Iterable[tuple[int, Any]]]] = {
    ".json": _json_array,
    ".jsonl": _json_lines,
    ".json.gz": _json_array,
    ".jsonl.gz": _json_lines,
    ".parquet": _parquet,
}


def _malformed(path: Path, line: int, error: json.JSONDecodeError, expected: str) -> InputError:
    return InputError(f"{path}:{line}: malformed JSON at column {error.colno}: {error.msg}; {expected}")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
