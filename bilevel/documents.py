"""Read text and JSON files of a known form back: whatever is wrong with one is a `DamagedError` that names it."""

from __future__ import annotations

import json
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
    text = read_text(file)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{file}: not JSON: {error}") from error
    return validated(file, content, kind)


def validated(file: Path, content: Any, kind: type[T]) -> T:
    """The content of a file as `kind`. Raises `DamagedError` naming file and key."""
    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise DamagedError(f"{file}: {key + ': ' if key else ''}{first['msg']}") from error
