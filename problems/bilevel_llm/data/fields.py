"""Take strings and conversations out of a row's fields, or say what is wrong with them. For authors of formats."""

from collections.abc import Mapping
from typing import Any

from bilevel.errors import InputError
from bilevel.suggest import did_you_mean
from bilevel_llm.data.format import Format
from bilevel_llm.data.layout import ROLES, ChatLayout
from bilevel_llm.data.rows import Row, Turn
from bilevel_llm.data.wording import kind_of, names_of_fields


def string(fields: Mapping[str, Any], name: str, where: str, path: str = "") -> str:
    """The string in a field that exists.

    where: the row's file and line. path: what precedes the field's name in messages, for fields inside other fields.

    Raises `InputError` for anything but a string, and for one that UTF-8 cannot hold.
    """
    value = fields[name]
    if not isinstance(value, str):
        raise InputError(f"{where}: field '{path}{name}' is {kind_of(value)}, but must be a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise InputError(
            f"{where}: field '{path}{name}' contains {half}, half of a surrogate pair; write the whole character"
        ) from error
    return value


def conversation(fields: Mapping[str, Any], name: str, where: str) -> tuple[Turn, ...]:
    """The turns in a field that exists: a list of {role, content} or {from, value}, with the names of `ROLES`.

    Raises `InputError` for anything else, naming the turn.
    """
    entries = fields[name]
    if not isinstance(entries, list):
        raise InputError(f"{where}: field {name!r} is {kind_of(entries)}, but must be a list of turns")
    return tuple([_turn(entry, f"{name}[{index}]", where) for index, entry in enumerate(entries)])


def chat_layout(format: Format, fields: Mapping[str, Any], *names: str) -> ChatLayout:
    """The layout of a row whose turns `conversation` reads from the fields of these names; the first turn decides."""
    turns = fields[names[0]]
    old = isinstance(turns, list) and turns and isinstance(turns[0], dict) and "from" in turns[0]
    return ChatLayout(format.name, names, *(("from", "value") if old else ("role", "content")))


def written_turns(format: Format, row: Row, role: str, text: str, names: Mapping[str, str] | None = None) -> list[Any]:
    """The turns of a conversation as `conversation` reads them.

    role, text: the keys of a turn. names: what the file calls a role, where that is not its own name.

    Raises `InputError` for a row without a chat template, as other tokens would be learned, and for one that masks turns.
    """
    if not row.is_chat:
        raise format.refusal(row, "it goes to the model without a chat template")
    if any(turn.masked for turn in row.turns):
        raise format.refusal(row, "not all of its answers are learned, which the format cannot say")
    return [{role: (names or {}).get(turn.role, turn.role), text: turn.text} for turn in row.turns]


def _turn(entry: Any, path: str, where: str) -> Turn:
    if not isinstance(entry, dict):
        raise InputError(f"{where}: {path} is {kind_of(entry)}, but must be an object with a role and a text")
    names = ("from", "value") if "from" in entry else ("role", "content")
    if any(name not in entry for name in names):
        raise InputError(
            f"{where}: {path} must have 'role' and 'content', or 'from' and 'value': it has {names_of_fields(entry)}"
        )
    role, text = (string(entry, name, where, f"{path}.") for name in names)
    if role not in ROLES:
        raise InputError(f"{where}: unknown role {role!r} in {path}.{names[0]}{did_you_mean(role, ROLES)}")
    return Turn(ROLES[role], text)
