"""How a record is laid out, more closely than its format: rows of one mix have one layout, and trainers are told it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bilevel.errors import InputError
from bilevel_llm.data.rows import Record, find_files, read_records


@dataclass(frozen=True)
class Layout:
    """Two records of one layout have their turns in the same fields.

    format: one of `rows.FORMATS`.
    field: the field that holds the list of turns; "" if texts are in fields of their own.
    role, text: the keys of a turn; "" without turns.
    """

    format: str
    field: str = ""
    role: str = ""
    text: str = ""

    def __str__(self) -> str:
        return f"{self.format} ({self.field} of {self.role} and {self.text})" if self.field else self.format


MESSAGES = Layout("messages", "messages", "role", "content")


def layout_of(record: Record) -> Layout:
    """The layout of one record, by its first turn."""
    candidates = {"messages": ["messages"], "sharegpt": ["conversations", "items"], "prompt_completion": ["prompt"]}
    for field in candidates.get(record.format, []):
        turns = record.fields.get(field)
        if isinstance(turns, list) and turns and isinstance(turns[0], dict):
            role, text = ("from", "value") if "from" in turns[0] else ("role", "content")
            return Layout(record.format, field, role, text)
    return Layout(record.format)


def first_records(patterns: Sequence[str], format: str | None) -> list[Record]:
    """The first record of each file of a source."""
    return [next(read_records(path, format)) for path in find_files(patterns)]


def common_layout(records: Iterable[Record]) -> Layout:
    """The layout that all these records share. Raises `InputError` naming two that differ."""
    seen: dict[Layout, str] = {}
    for record in records:
        layout = layout_of(record)
        seen.setdefault(layout, f"{record.where} is {layout}")
    if len(seen) > 1:
        first, second, *_ = seen.values()
        raise InputError(f"the sources do not share one row format: {first}, but {second}; use --format messages")
    (layout,) = seen
    return layout


def as_messages(record: Record) -> dict[str, Any]:
    """The record as {"messages": [{role, content}]}.

    Raises `InputError` for rows that are used without a chat template: as messages they would be other tokens than those
    the weights were learned on.
    """
    turns = record.row().turns
    if any(turn.role in ("text", "prompt", "completion") for turn in turns):
        raise InputError(
            f"{record.where}: a row of format {record.format!r} goes to the model without a chat template, so it cannot be "
            "written as messages; use --format source (for which all sources need one format)"
        )
    return {"messages": [{"role": turn.role, "content": turn.text} for turn in turns]}
