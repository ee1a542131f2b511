"""JSON as it is found in data files: arrays too large to be held, values that Python cannot hold, names given twice."""

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from bilevel.errors import InputError
from bilevel_llm.data.wording import kind_of

MAX_ROW = 16 << 20
"""The most bytes, or characters, that a row may have in a file of text: some three million words."""

_CHUNK = 1 << 16


@dataclass(frozen=True, slots=True)
class Unparsed:
    """A value left as text: Python cannot hold it, or it is not clear. In a field that nobody reads, it does no harm.

    kind: what it is, for messages.
    """

    text: str
    kind: str


def parse(text: str, where: str, expected: str) -> Any:
    """The value that a text is. Raises `InputError`, with what was `expected` of the text, if it is not one JSON value."""
    try:
        start = _after_space(text, 0)
        value, end = _value(text, start)
        if (rest := _after_space(text, end)) < len(text):
            raise json.JSONDecodeError("Extra data", text, rest)
    except json.JSONDecodeError as error:
        raise _malformed(where, error.colno, error.msg, expected) from error
    return value


def array_elements(file: IO[bytes], path: Path) -> Iterator[tuple[int, Any]]:
    """The elements of the array that a file is, one by one, each with the line on which it starts.

    Raises `InputError` for a file that is not one JSON array, and for an element of more than `MAX_ROW` characters.
    """
    text = _Text(file, path)
    text.skip_space()
    if not text.begins("["):
        raise InputError(
            f"{path}: the file holds {kind_of(text.value())}, not an array of rows; "
            "put the rows into [...], or call the file .jsonl if it has one object a line"
        )
    text.skip()
    if not text.begins("]"):
        while True:
            line = text.line
            yield line, text.value()
            text.skip_space()
            if not text.begins(","):
                break
            text.skip()
    if not text.begins("]"):
        raise text.malformed("Expecting ',' or ']'")
    text.skip()
    if not text.at_end():
        raise text.malformed("Extra data")


class _Text:
    """A text of which only the part that is being parsed is held. The next character is on `line`, in `column`."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._path = path
        self._text = ""
        self._at = 0  # what is before it, has been parsed
        self.line = self.column = 1

    def begins(self, character: str) -> bool:
        """Whether this is the next character."""
        return self._text.startswith(character, self._at)

    def at_end(self) -> bool:
        """Whether nothing follows."""
        return self._at == len(self._text)

    def skip(self) -> None:
        """Go to what follows the next character and the white space after it."""
        self._go_to(self._at + 1)
        self.skip_space()

    def skip_space(self) -> None:
        """Go to the next character that is no white space."""
        while True:
            self._go_to(_after_space(self._text, self._at))
            if not self.at_end() or not self._more():
                return

    def value(self) -> Any:
        """The next value; go to what follows it."""
        while True:
            try:
                value, end = _value(self._text, self._at)
            except json.JSONDecodeError as error:
                ahead = error.pos - self._at
                if _may_go_on(error) and self._more():
                    continue
                raise self.malformed(error.msg, ahead) from error
            ahead = end - self._at
            if end == len(self._text) and self._more():
                continue  # a number may go on
            self._go_to(self._at + ahead)
            return value

    def malformed(self, problem: str, ahead: int = 0) -> InputError:
        """What is wrong so many characters ahead."""
        self._go_to(self._at + ahead)
        return _malformed(f"{self._path}:{self.line}", self.column, problem, "the file must be one JSON array of objects")

    def _go_to(self, position: int) -> None:
        lines = self._text.count("\n", self._at, position)
        last = self._text.rfind("\n", self._at, position)
        self.column = position - last if lines else self.column + position - self._at
        self.line += lines
        self._at = position

    def _more(self) -> bool:
        """Read on, and forget what has been parsed; False at the end of the file."""
        self._text, self._at = self._text[self._at :], 0
        if len(self._text) > MAX_ROW:
            raise too_long(f"{self._path}:{self.line}", "row")
        try:
            read = self._file.read(max(_CHUNK, len(self._text)))
            more = self._decoder.decode(read, final=not read)
        except UnicodeDecodeError as error:
            line = self.line + self._text.count("\n") + error.object[: error.start].count(b"\n")
            raise not_utf8(f"{self._path}:{line}", error) from error
        self._text += more
        return bool(read)


def not_utf8(where: str, error: UnicodeDecodeError) -> InputError:
    """The error for bytes that are no text."""
    return InputError(f"{where}: byte 0x{error.object[error.start]:02x} is not UTF-8; save the file as UTF-8")


def too_long(where: str, what: str) -> InputError:
    """The error for a row that does not end. what: what is too long."""
    return InputError(f"{where}: the {what} is longer than {MAX_ROW >> 20} MiB, the most that a row may have; split it")


def _malformed(where: str, column: int, problem: str, expected: str) -> InputError:
    return InputError(f"{where}: malformed JSON at column {column}: {problem}; {expected}")


def _integer(digits: str) -> Any:
    try:
        return int(digits)
    except ValueError:  # Python reads no more than some thousands of digits
        return Unparsed(digits, f"a number of {len(digits):,} digits")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        for name in {name for name, value in pairs if value != fields[name]}:
            fields[name] = Unparsed(name, "several values (its name is given more than once)")
    return fields


_DECODER = json.JSONDecoder(parse_int=_integer, object_pairs_hook=_object)
_SPACE = re.compile(r"[ \t\r\n]*")
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"|([\[{]+)|([\]}])', re.DOTALL)


def _after_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None  # it matches the empty string
    return match.end()


def _may_go_on(error: json.JSONDecodeError) -> bool:
    """Whether the text may be the beginning of a value: its end is where the error is, but for the start of a word."""
    return error.msg.startswith("Unterminated string") or error.pos >= len(error.doc) - len("-Infinity")


def _value(text: str, start: int) -> tuple[Any, int]:
    """The value that starts there, and its end. In an object that is nested too deeply, the fields that are stay text."""
    try:
        return _DECODER.raw_decode(text, start)
    except RecursionError:
        end = _end_of_nested(text, start)
    if text[start] != "{":
        return Unparsed(text[start:end], "a value that is nested too deeply"), end
    fields: dict[str, Any] = {}
    at = _after_space(text, start + 1)
    while not text.startswith("}", at):
        key, at = _DECODER.raw_decode(text, at)
        at = _after_space(text, at)
        if not (isinstance(key, str) and text.startswith(":", at)):
            raise json.JSONDecodeError("Expecting ':' delimiter", text, at)
        at = _after_space(text, at + 1)
        try:
            fields[key], at = _DECODER.raw_decode(text, at)
        except RecursionError:
            stop = _end_of_nested(text, at)
            fields[key], at = Unparsed(text[at:stop], "a value that is nested too deeply"), stop
        at = _after_space(text, at)
        if text.startswith(",", at):
            at = _after_space(text, at + 1)
        elif not text.startswith("}", at):
            raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
    return fields, at + 1


def _end_of_nested(text: str, start: int) -> int:
    """Where the list or object that starts there ends."""
    depth = 0
    for match in _BRACKETS.finditer(text, start):
        if match[1]:
            depth += len(match[1])
        elif match[2]:
            depth -= 1
            if depth == 0:
                return match.end()
    raise json.JSONDecodeError("Expecting ',' delimiter", text, len(text))
