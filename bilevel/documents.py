"""Read text and JSON files of a known form back: whatever is wrong with one is a `DamagedError` that names it."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from bilevel.errors import DamagedError

T = TypeVar("T")


def read_text(file: Path) -> str:
    """The content of a UTF-8 file. Raises `DamagedError` if it is missing, cannot be read, or is not text."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise DamagedError(f"{file} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DamagedError(f"{file}:{line}: not UTF-8: {error.reason} at byte {error.start}") from error


def read_json(file: Path, kind: type[T]) -> T:
    """The content of a JSON file as `kind`, which pydantic checks. Raises `DamagedError` naming the key that is wrong."""
    return _parsed(file, read_text(file), kind)


def read_json_lines(file: Path, kind: type[T]) -> Iterator[T]:
    """The lines of a JSONL file as `kind`. Raises `DamagedError` naming line and key."""
    for number, line in enumerate(read_text(file).split("\n"), start=1):  # a text may hold what else ends a line
        if line:
            yield _parsed(f"{file}:{number}", line, kind)


def validated(file: Path | str, content: Any, kind: type[T]) -> T:
    """The content of a file as `kind`. Raises `DamagedError` naming file and key."""
    try:
        checked: T = _checker(kind).validate_python(content)  # type: ignore[arg-type]  # a class is hashable
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise DamagedError(f"{file}: {key + ': ' if key else ''}{first['msg'].removeprefix('Value error, ')}") from error
    return checked


def _parsed(where: Path | str, text: str, kind: type[T]) -> T:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{where}: not JSON: {error}") from error
    return validated(where, content, kind)


@functools.cache
def _checker(kind: type) -> TypeAdapter[Any]:
    """What checks content; making it takes longer than a check, and the lines of a file are checked one by one."""
    return TypeAdapter(kind)
