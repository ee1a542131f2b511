"""Data files -> rows of turns: one way to see the formats that instruction data comes in.

| format            | fields of a row                                                                          |
|-------------------|------------------------------------------------------------------------------------------|
| messages          | `messages`: list of {role, content}                                                      |
| sharegpt          | `conversations` or `items`: list of {from, value}                                        |
| alpaca            | `instruction`, `output` and, optionally, `input`                                         |
| prompt_completion | `prompt`, `completion`: two strings used as they are, or two lists of messages           |
| text              | `text`: a string to learn as it is                                                       |

Other fields are ignored. Files are `.json` (an array of objects), `.jsonl`, both also with `.gz`, `.parquet`, and
directories written by `datasets.Dataset.save_to_disk`.
"""

import difflib
import glob
import gzip
import hashlib
import json
import os
import re
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bilevel.errors import InputError
from bilevel.suggest import did_you_mean, nearest

ROLES: Mapping[str, str] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
"""Names of roles in files -> the three roles of a conversation."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One text of a row.

    role: "system", "user" or "assistant" in a conversation; "prompt" and "completion", or "text", in a row that goes to
        the model as it is, without a chat template.
    """

    role: str
    text: str


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a data file.

    turns: never empty; a conversation has at least one assistant turn.
    where: "file:line", the line on which the row starts. Where rows have no lines of their own (parquet, saved data
        sets, an array written on one line) it is the row's number, from 1.
    """

    turns: tuple[Turn, ...]
    where: str


@dataclass(frozen=True, slots=True)
class Record:
    """One row as its file has it.

    fields: every field, those that are ignored included.
    format: how it is to be read; one of `FORMATS`.
    file, number: where it stands; the number is that of `Row.where`.
    """

    fields: Mapping[str, Any]
    format: str
    file: Path
    number: int

    @property
    def where(self) -> str:
        """As `Row.where`."""
        return f"{self.file}:{self.number}"

    def row(self) -> Row:
        """Its turns. Raises `InputError` as `read_rows` does."""
        return Row(_FORMATS[self.format].turns(self.fields, self.where), self.where)


def read_rows(patterns: Sequence[str], *, format: str | None = None) -> list[Row]:
    """Read all rows of the files that `patterns` name, in the order of `find_files`.

    format: one of `FORMATS`; None detects it from each file's first row.

    Raises `InputError` for whatever cannot be read, naming file, line and field: no such file, no match, an unknown
    type of file, an empty file, bytes that are not UTF-8, malformed JSON, a row that is not an object, lacks a field of
    its format or has one of the wrong type, an unknown role or format, a conversation without an assistant turn.
    """
    return [row for path in find_files(patterns) for row in read_file(path, format)]


def find_files(patterns: Sequence[str]) -> list[Path]:
    """The files that paths and globs name, in the order of `patterns`, each once; matches of a glob are sorted.

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


def read_file(path: Path, format: str | None = None) -> list[Row]:
    """The rows of one file or saved data set. See `read_rows`."""
    return [record.row() for record in read_records(path, format)]


def read_records(path: Path, format: str | None = None) -> Iterator[Record]:
    """The rows of one file or saved data set, unchanged. Raises `InputError` as `read_rows`, but for what turns hold."""
    if format is not None and format not in _FORMATS:
        raise InputError(f"unknown format {format!r}{did_you_mean(format, FORMATS)}")
    empty = True
    for number, fields in _records(path):
        where = f"{path}:{number}"
        if not isinstance(fields, dict):
            raise InputError(f"{where}: the row is {_kind(fields)}; every row must be an object, {{...}}")
        format = format or _detect(fields, where)
        _require_fields(fields, format, where)
        yield Record(fields, format, path, number)
        empty = False
    if empty:
        raise InputError(f"{path}: the file holds no rows; remove it from the list of files or fill it")


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


def fingerprint(row: Row) -> int:
    """64 bits that two rows share if their texts are equal once normalised; roles and file formats do not matter.

    Normalised: Unicode NFKC, case folded, every run of white space one space, none at the ends.
    """
    texts = (" ".join(unicodedata.normalize("NFKC", turn.text).casefold().split()) for turn in row.turns)
    return int.from_bytes(hashlib.blake2b("\0".join(texts).encode(), digest_size=8).digest(), "little")


# ---------------------------------------------------------------------------------------------------- files -> records


def _matches(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.exists():  # asked first: a plain path may contain brackets
        return [path]
    if not glob.has_magic(pattern):
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = nearest(path.name, siblings)
        guess = f"; did you mean {near!r}?" if near else ""
        raise InputError(f"no such file: {pattern} (seen from {Path.cwd()}){guess}")
    found = [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]
    found = [path for path in found if path.is_file() or _is_saved_dataset(path)]
    if not found:
        raise InputError(f"no file matches {pattern} (seen from {Path.cwd()}); check the folder and the ending")
    return found


def _is_saved_dataset(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _records(path: Path) -> Iterable[tuple[int, Any]]:
    """The raw rows of a file, numbered as `Row.where` says."""
    kind = file_type(path)
    return _saved_dataset(path) if kind == "directory" else _READERS[kind](path)


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
    """Position and value of each element of a JSON array: unlike `json.loads`, which forgets where things stood."""

    def after_space(position: int) -> int:
        match = _SPACE.match(text, position)
        assert match is not None  # it matches the empty string
        return match.end()

    decoder = json.JSONDecoder()
    at = after_space(0)
    if text[at] != "[":
        value, _ = decoder.raw_decode(text, at)
        raise InputError(
            f"{path}: the file holds {_kind(value)}, not an array of rows; "
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


# ---------------------------------------------------------------------------------------------------- records -> turns


def _alpaca(record: Mapping[str, Any], where: str) -> tuple[Turn, ...]:
    instruction = _string(record, "instruction", where)
    extra = _string(record, "input", where) if record.get("input") is not None else ""
    output = _string(record, "output", where)
    return Turn("user", f"{instruction}\n\n{extra}" if extra else instruction), Turn("assistant", output)


def _sharegpt(record: Mapping[str, Any], where: str) -> tuple[Turn, ...]:
    field = "conversations" if "conversations" in record else "items"
    return _answered(_conversation(record, field, where), where)


def _messages(record: Mapping[str, Any], where: str) -> tuple[Turn, ...]:
    return _answered(_conversation(record, "messages", where), where)


def _prompt_completion(record: Mapping[str, Any], where: str) -> tuple[Turn, ...]:
    if isinstance(record["prompt"], list):
        conversation = [*_conversation(record, "prompt", where), *_conversation(record, "completion", where)]
        return _answered(conversation, where)
    return Turn("prompt", _string(record, "prompt", where)), Turn("completion", _string(record, "completion", where))


def _plain_text(record: Mapping[str, Any], where: str) -> tuple[Turn, ...]:
    return (Turn("text", _string(record, "text", where)),)


@dataclass(frozen=True)
class _Format:
    """fields: alternatives, each the fields that a row must have."""

    fields: tuple[tuple[str, ...], ...]
    turns: Callable[[Mapping[str, Any], str], tuple[Turn, ...]]

    def fits(self, record: Mapping[str, Any]) -> bool:
        return any(all(field in record for field in fields) for fields in self.fields)


# In the order of detection: rows of chat data often carry a rendered `text` or a bare `prompt` besides their turns.
_FORMATS: Mapping[str, _Format] = {
    "messages": _Format((("messages",),), _messages),
    "sharegpt": _Format((("conversations",), ("items",)), _sharegpt),
    "alpaca": _Format((("instruction", "output"),), _alpaca),
    "prompt_completion": _Format((("prompt", "completion"),), _prompt_completion),
    "text": _Format((("text",),), _plain_text),
}

FORMATS: tuple[str, ...] = tuple(_FORMATS)
"""Names of the known row formats."""


def _detect(record: Mapping[str, Any], where: str) -> str:
    for name, format in _FORMATS.items():
        if format.fits(record):
            return name
    raise InputError(f"{where}: the row is in no known format: it has {_fields_of(record)}{_closest_format(record)}")


def _require_fields(record: Mapping[str, Any], format: str, where: str) -> None:
    if _FORMATS[format].fits(record):
        return
    alternatives = _FORMATS[format].fields
    if len(alternatives) == 1:
        missing = " and ".join(repr(field) for field in alternatives[0] if field not in record)
    else:
        missing = " or ".join(repr(fields[0]) for fields in alternatives)
    raise InputError(
        f"{where}: the row has no {missing}, which format {format!r} needs: it has {_fields_of(record)}"
        f"{_closest_format(record)}"
    )


def _closest_format(record: Mapping[str, Any]) -> str:
    """What to do about a row that does not fit: the format whose fields it comes closest to."""

    def likeness(name: str) -> float:
        return max(sum(map(presence, fields)) / len(fields) for fields in _FORMATS[name].fields)

    def presence(field: str) -> float:
        """1 where the row has the field, and a part of that where it has one of a similar name."""
        return max((difflib.SequenceMatcher(None, field, own).ratio() for own in record), default=0)

    best = max(_FORMATS, key=likeness)
    if _FORMATS[best].fits(record):
        return f"; it fits format {best!r}: set format: {best}"
    needs = " or ".join(" and ".join(fields) for fields in _FORMATS[best].fields)
    return f"; the nearest format is {best!r}: rename the row's fields to {needs}"


def _conversation(record: Mapping[str, Any], field: str, where: str) -> list[Turn]:
    entries = record[field]
    if not isinstance(entries, list):
        raise InputError(f"{where}: field {field!r} is {_kind(entries)}, but must be a list of turns")
    return [_turn(entry, f"{field}[{index}]", where) for index, entry in enumerate(entries)]


def _turn(entry: Any, path: str, where: str) -> Turn:
    if not isinstance(entry, dict):
        raise InputError(f"{where}: {path} is {_kind(entry)}, but must be an object with a role and a text")
    names = ("from", "value") if "from" in entry else ("role", "content")
    if any(name not in entry for name in names):
        raise InputError(
            f"{where}: {path} must have 'role' and 'content', or 'from' and 'value': it has {_fields_of(entry)}"
        )
    role, text = (_string(entry, name, where, f"{path}.") for name in names)
    if role not in ROLES:
        raise InputError(f"{where}: unknown role {role!r} in {path}.{names[0]}{did_you_mean(role, ROLES)}")
    return Turn(ROLES[role], text)


def _answered(conversation: Sequence[Turn], where: str) -> tuple[Turn, ...]:
    if not any(turn.role == "assistant" for turn in conversation):
        roles = ", ".join(turn.role for turn in conversation) or "none at all"
        raise InputError(f"{where}: no assistant turn to learn from (turns: {roles}); remove the row or complete it")
    return tuple(conversation)


def _string(record: Mapping[str, Any], field: str, where: str, path: str = "") -> str:
    value = record[field]
    if not isinstance(value, str):
        raise InputError(f"{where}: field '{path}{field}' is {_kind(value)}, but must be a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise InputError(
            f"{where}: field '{path}{field}' contains {half}, half of a surrogate pair; write the whole character"
        ) from error
    return value


# --------------------------------------------------------------------------------------------------- parts of messages


def _malformed(path: Path, line: int, error: json.JSONDecodeError, expected: str) -> InputError:
    return InputError(f"{path}:{line}: malformed JSON at column {error.colno}: {error.msg}; {expected}")


def _kind(value: Any) -> str:
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


def _fields_of(record: Mapping[str, Any]) -> str:
    return ", ".join(record) or "no fields"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
