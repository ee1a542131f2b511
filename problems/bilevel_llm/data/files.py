"""Data files -> the objects that they hold, whatever the fields of these mean, one by one.

Files are `.jsonl` or `.ndjson` (an object a line), `.json` (an array of objects, or an object a line), `.csv` and `.tsv`
(whose first line names the fields), all of them also compressed (`.gz`, `.zst`); `.parquet`, `.arrow`, and directories
written by `datasets.Dataset.save_to_disk`. At most a few hundred rows are held at once, and a row of text has at most
`MAX_ROW` bytes.
"""

import csv
import glob
import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from bilevel.errors import InputError
from bilevel.suggest import did_you_mean, nearest
from bilevel_llm.data.json_text import MAX_ROW, array_elements, not_utf8, parse, too_long

OnBad = Callable[[InputError], None]
"""Called with what is wrong with a row; if it returns, the row is left out."""

Watch = Callable[[int], None]
"""Told how many more bytes of a file have been read, as the disk has them: of a table, about so many."""

_ROWS = 256  # of a table, held at once

_NAMES = {",": "commas", "\t": "tabs"}
_DELIMITERS = (";", "\t", "|", ",")  # of which one in the name of an only column says how the cells are separated

_Batches = Callable[[Path], Iterator[tuple[Any, float]]]  # rows of a table, and which part of it they are


def raise_it(error: InputError) -> None:
    """The `OnBad` under which no row may be left out."""
    raise error


def unwatched(read: int) -> None:
    """The `Watch` for files that are read too quickly for anybody to wait for them."""


def pass_over(error: InputError) -> None:
    """The `OnBad` for files whose bad rows have been counted, and told of, before."""


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


def read_objects(path: Path, on_bad: OnBad = raise_it, watch: Watch = unwatched) -> Iterator[tuple[int, Any]]:
    """The rows of one file or saved data set, unchanged, each with its number (see `Row.where`).

    on_bad: called with what is wrong with a line. What makes the rest of a file unreadable is raised in any case.

    Raises `InputError`, naming file and line, for an unknown type of file, an empty file, bytes that are not UTF-8,
    malformed JSON or CSV, and a row of more than `MAX_ROW` bytes.
    """
    type = file_type(path)
    if type in _TABLES:
        return _rows_of_table(path, _TABLES[type], watch)
    return _READERS[type.removesuffix(".gz").removesuffix(".zst")](path, on_bad, watch)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a directory."""
    members = path.rglob("*") if path.is_dir() else [path]
    return sum(member.stat().st_size for member in members if member.is_file())


def file_type(path: Path) -> str:
    """How a file is to be read: its ending, such as ".jsonl.gz" or ".parquet", in small letters; or "directory".

    Raises `InputError` for any other ending, and for a directory that is not a saved data set.
    """
    if _is_saved_dataset(path):
        return "directory"
    if path.is_dir():
        raise InputError(
            f"{path}: a directory, but not one written by datasets.save_to_disk; name its files, as in {path}/*.jsonl"
        )
    name = path.name.lower()
    for ending in (*_ENDINGS, *_TABLES):
        if name.endswith(ending):
            return ending
    raise InputError(
        f"{path}: unknown type of file {path.suffix!r}; known: {', '.join(_READERS)}, all of them also with .gz or .zst, "
        ".parquet, .arrow, and directories written by datasets.save_to_disk"
    )


def split_of(path: Path, split: str) -> Path:
    """The directory of one split of a saved `DatasetDict`; anything else itself. Raises `InputError` if there is none."""
    if not (path / "dataset_dict.json").is_file():
        return path
    if not (path / split).is_dir():
        splits = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
        raise InputError(f"{path}: there is no split {split!r}{did_you_mean(split, splits)}")
    return path / split


def unknown_ending(name: str) -> bool:
    """Whether a name does not end as those of data files do."""
    return not name.lower().endswith((*_ENDINGS, *_TABLES))


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


# ------------------------------------------------------------------------------------------------------- files of text


class _Watched(io.FileIO):
    """A file whose reading is watched."""

    def __init__(self, path: Path, watch: Watch) -> None:
        super().__init__(path)
        self._watch = watch

    def readinto(self, buffer: Any) -> int | None:
        """See `io.RawIOBase.readinto`."""
        read = super().readinto(buffer)
        self._watch(read or 0)
        return read


@contextmanager
def _opened(path: Path, watch: Watch = unwatched) -> Iterator[IO[bytes]]:
    """The bytes of a file, uncompressed as they are read. Raises `InputError` for one that cannot be read to its end."""
    compressed = path.suffix.lower().removeprefix(".")
    try:
        with io.BufferedReader(_Watched(path, watch)) as raw, _uncompressed(raw, compressed) as file:
            if file.peek(3).startswith(b"\xef\xbb\xbf"):  # editors on Windows put a byte-order mark first
                file.read(3)
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: not a whole gzip file ({error}); compress or download it again") from error
    except OSError as error:
        if error.errno is None:  # of pyarrow's
            raise InputError(f"{path}: not a whole {compressed} file ({error}); compress or download it again") from error
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def _uncompressed(raw: IO[bytes], compressed: str) -> io.BufferedReader:
    match compressed:
        case "gz":
            return io.BufferedReader(gzip.GzipFile(fileobj=raw))
        case "zst":
            import pyarrow

            return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd"))
        case _:
            return raw  # type: ignore[return-value]  # open() gives one


def _lines(path: Path, on_bad: OnBad, watch: Watch) -> Iterator[tuple[int, str]]:
    """All lines with their numbers. One that is no text, or too long, is empty if `on_bad` returns."""
    # not splitlines(): JSON strings may contain U+2028 and other characters which that takes for line ends
    with _opened(path, watch) as file:
        number, empty = 0, True
        while line := file.readline(MAX_ROW + 1):
            number += 1
            empty = empty and not line.strip()
            text = ""
            try:
                if len(line) > MAX_ROW:
                    while line and not line.endswith(b"\n"):
                        line = file.readline(MAX_ROW)
                    raise too_long(f"{path}:{number}", "line")
                text = line.decode()
            except UnicodeDecodeError as error:
                on_bad(not_utf8(f"{path}:{number}", error))
            except InputError as error:
                on_bad(error)
            yield number, text
        if empty:
            raise _empty(path)


def _json_lines(path: Path, on_bad: OnBad, watch: Watch) -> Iterator[tuple[int, Any]]:
    for number, line in _lines(path, on_bad, watch):
        if not line.strip():
            continue
        try:
            value = parse(line, f"{path}:{number}", "every line of this file must be one JSON object")
        except InputError as error:
            on_bad(error)
        else:
            yield number, value


def _json(path: Path, on_bad: OnBad, watch: Watch) -> Iterator[tuple[int, Any]]:
    """An array; or an object a line, which some write into files of this name."""
    with _opened(path) as file:
        while (first := file.read(1)).isspace():
            pass
    if not first:
        raise _empty(path)
    if first == b"{":
        yield from _json_lines(path, on_bad, watch)
        return
    by_line = _have_lines_of_their_own(path)
    with _opened(path, watch) as file:
        for number, (line, value) in enumerate(array_elements(file, path), start=1):
            yield line if by_line else number, value


def _have_lines_of_their_own(path: Path) -> bool:
    """Whether every element of an array starts on another line, so that the line says which it is."""
    last = 0
    with _opened(path) as file:
        for line, _ in array_elements(file, path):
            if line == last:
                return False
            last = line
    return True


def _tsv(path: Path, on_bad: OnBad, watch: Watch) -> Iterator[tuple[int, Any]]:
    return _csv(path, on_bad, watch, "\t")


def _csv(path: Path, on_bad: OnBad, watch: Watch, delimiter: str = ",") -> Iterator[tuple[int, Any]]:
    """Rows of strings, each numbered by the line on which it starts."""
    csv.field_size_limit(MAX_ROW)  # of the whole process: the module knows no other way
    reader = csv.reader((text or "\n" for _, text in _lines(path, on_bad, watch)), delimiter=delimiter, strict=True)
    names: list[str] = []
    while True:
        line = reader.line_num + 1
        where = f"{path}:{line}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise InputError(
                f"{where}: malformed CSV: {error}; write the file again, with quotes around every cell"
            ) from error
        if cells is None:
            return
        if not cells:
            continue
        if not names:
            names = cells
            if len(names) == 1 and (other := next((sign for sign in _DELIMITERS if sign in names[0]), None)):
                sign = {"\t": "tabs"}.get(other, repr(other))
                remedy = "name the file .tsv" if other == "\t" else f"write it again with {_NAMES[delimiter]}"
                raise InputError(
                    f"{where}: the first line names one column, {names[0]!r}: the cells seem to be separated by {sign}, and "
                    f"not by {_NAMES[delimiter]}; {remedy}"
                )
            if len(set(names)) < len(names) or not all(names):
                raise InputError(
                    f"{where}: the first line must name every column, each differently: it has {', '.join(names)}"
                )
        elif len(cells) != len(names):
            on_bad(InputError(f"{where}: the row has {len(cells)} cells, and the first line names {len(names)} columns"))
        else:
            yield line, dict(zip(names, cells, strict=True))


def _empty(path: Path) -> InputError:
    return InputError(f"{path}: the file is empty; remove it from the list of files or fill it")


# -------------------------------------------------------------------------------------------------------------- tables


def _rows_of_table(path: Path, batches: _Batches, watch: Watch) -> Iterator[tuple[int, Any]]:
    from pyarrow import ArrowException

    number, size = 0, size_of(path)
    try:
        for batch, share in batches(path):
            for start in range(0, batch.num_rows, _ROWS):
                for row in batch.slice(start, _ROWS).to_pylist():
                    number += 1
                    yield number, row
            watch(round(size * share))
    except (ArrowException, OSError, ValueError, KeyError) as error:
        after = f" after row {number}" if number else ""
        kind = "saved data set" if path.is_dir() else f"{path.suffix.lower().removeprefix('.')} file"
        raise InputError(f"{path}: not a readable {kind}{after}: {_first_line(error)}") from error


def _parquet(path: Path) -> Iterator[tuple[Any, float]]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        for batch in file.iter_batches(_ROWS):
            yield batch, batch.num_rows / file.metadata.num_rows


def _arrow(path: Path) -> Iterator[tuple[Any, float]]:
    import pyarrow

    with pyarrow.memory_map(str(path)) as file:
        size = file.size()
        if file.read(6) == b"ARROW1":  # the file format; `datasets` writes the stream format under the same ending
            whole = pyarrow.ipc.open_file(file)
            batches: Iterable[Any] = map(whole.get_batch, range(whole.num_record_batches))
        else:
            file.seek(0)
            batches = pyarrow.ipc.open_stream(file)
        for batch in batches:
            yield batch, batch.nbytes / size


def _saved_dataset(path: Path) -> Iterator[tuple[Any, float]]:
    from datasets import DatasetDict, load_from_disk

    dataset = load_from_disk(str(path))
    if isinstance(dataset, DatasetDict):
        if len(dataset) != 1:
            splits = list(dataset)
            example = splits[0]
            raise InputError(
                f"{path}: there are the splits {', '.join(splits)}; say which, as in split: {example} or {path}/{example}"
            )
        (dataset,) = dataset.values()
    for batch in dataset.with_format("arrow").iter(_ROWS):
        yield batch, batch.num_rows / len(dataset)


_READERS: Mapping[str, Callable[[Path, OnBad, Watch], Iterator[tuple[int, Any]]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
}
_ENDINGS = tuple(text + compressed for text in _READERS for compressed in ("", ".gz", ".zst"))
_TABLES: Mapping[str, _Batches] = {
    ".parquet": _parquet,
    ".arrow": _arrow,
    "directory": _saved_dataset,
}


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
