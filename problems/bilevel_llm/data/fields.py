"""Take strings and conversations out of a row's fields, or say what is wrong with them. For authors of formats."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from bilevel.errors import InputError
from bilevel.suggest import did_you_mean
from bilevel_llm.data.format import Format
from bilevel_llm.data.layout import ROLES, ChatLayout
from bilevel_llm.data.meaning import IN_TURNS, SYSTEM, TOOL_ROLES, refuse
from bilevel_llm.data.rows import Row, Turn
from bilevel_llm.data.wording import kind_of, names_of_fields

REASONING = ("reasoning_content", "reasoning", "thinking")
"""The keys under which a turn may hold what the assistant thinks before it answers."""

_LEARN = ("weight", "train", "training", "loss", "trainable")
_MASK = ("mask", "masked")


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


def optional_string(fields: Mapping[str, Any], name: str, where: str, path: str = "") -> str:
    """The string in a field; "" if there is no such field, or null in it. Raises `InputError` as `string` does."""
    return "" if fields.get(name) is None else string(fields, name, where, path)


def conversation(fields: Mapping[str, Any], name: str, where: str, *, learned: bool = True) -> tuple[Turn, ...]:
    """The turns in a field that exists: a list of {role, content} or {from, value}, with the names of `ROLES`.

    The list may be written as a string of JSON (in tables, which have no lists), and a content as a list of parts of text. A
    turn may say that it is not to be learned (`weight: 0`, `train: false`, `mask: true`, and what else trainers call this),
    and hold the assistant's reasoning beside the answer.

    learned: False masks all turns: they are the beginning of a conversation, of which only the end is to be learned.

    Raises `InputError` for anything else, naming the turn, and for a turn with a field that would change its meaning and is
    not read.
    """
    return tuple(
        [_turn(entry, f"{name}[{index}]", where, learned) for index, entry in enumerate(turn_entries(fields, name, where))]
    )


def with_system(fields: Mapping[str, Any], turns: tuple[Turn, ...], where: str) -> tuple[Turn, ...]:
    """The turns of a conversation after the system prompt that its row may hold in a field of its own (see `SYSTEM`).

    Raises `InputError` if the conversation has another one already.
    """
    prompts = {name: text for name in SYSTEM if (text := optional_string(fields, name, where))}
    if turns and turns[0].role == "system":
        prompts["the first turn"] = turns[0].text
        turns = turns[1:]
    if len(set(prompts.values())) > 1:
        raise InputError(f"{where}: the system prompts in {' and '.join(prompts)} differ; keep one of them")
    return (*(Turn("system", text) for text in set(prompts.values())), *turns)


def turn_entries(fields: Mapping[str, Any], name: str, where: str) -> Sequence[Any]:
    """The list in a field that exists, which may be written as a string of JSON. Raises `InputError` for anything else."""
    entries = fields[name]
    if isinstance(entries, str) and entries.lstrip().startswith("["):
        try:
            entries = json.loads(entries)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: field {name!r} is a string that is not valid JSON: {error}") from error
    if not isinstance(entries, list):
        raise InputError(f"{where}: field {name!r} is {kind_of(entries)}, but must be a list of turns")
    return entries


def chat_layout(format: Format, fields: Mapping[str, Any], *names: str) -> ChatLayout:
    """The layout of a row whose turns `conversation` reads from the fields of these names; the first turn decides."""
    turns = fields[names[0]]
    old = isinstance(turns, list) and turns and isinstance(turns[0], dict) and "from" in turns[0]
    return ChatLayout(format.name, names, *(("from", "value") if old else ("role", "content")))


def written_turns(
    format: Format, row: Row, role: str, text: str, names: Mapping[str, str] | None = None, *, in_full: bool = False
) -> list[Any]:
    """The turns of a conversation as `conversation` reads them.

    role, text: the keys of a turn. names: what the file calls a role, where that is not its own name.
    in_full: whether a turn of this format may have further keys, which say what is not learned, and what the assistant
        thinks.

    Raises `InputError` for a row without a chat template, as other tokens would be learned, and for turns that need further
    keys where the format has none.
    """
    if not row.is_chat:
        raise format.refusal(row, "it goes to the model without a chat template")
    if not in_full and any(turn.masked for turn in row.turns):
        raise format.refusal(row, "not all of its answers are learned, which the format cannot say")
    if not in_full and any(turn.reasoning for turn in row.turns):
        raise format.refusal(row, "its answers have reasoning, which the format cannot hold")
    return [
        {role: (names or {}).get(turn.role, turn.role), text: turn.text}
        | ({REASONING[0]: turn.reasoning} if turn.reasoning else {})
        | ({"weight": 0} if turn.masked else {})
        for turn in row.turns
    ]


def _turn(entry: Any, path: str, where: str, learned: bool) -> Turn:
    if not isinstance(entry, dict):
        raise InputError(f"{where}: {path} is {kind_of(entry)}, but must be an object with a role and a text")
    names = ("from", "value") if "from" in entry else ("role", "content")
    if any(name not in entry for name in names):
        refuse(entry, IN_TURNS, where, f"{path}.")  # calls of tools often come without any content
        raise InputError(
            f"{where}: {path} must have 'role' and 'content', or 'from' and 'value': it has {names_of_fields(entry)}"
        )
    role = string(entry, names[0], where, f"{path}.")
    if role in TOOL_ROLES:
        raise InputError(
            f"{where}: {path}.{names[0]} is {role!r}, {TOOL_ROLES[role]}, which is not supported; leave out rows with tools"
        )
    if role not in ROLES:
        raise InputError(f"{where}: unknown role {role!r} in {path}.{names[0]}{did_you_mean(role, ROLES)}")
    refuse(entry, IN_TURNS, where, f"{path}.")
    reasoning = _reasoning(entry, path, where)
    if reasoning and ROLES[role] != "assistant":
        raise InputError(f"{where}: {path} has the reasoning of a turn of role {role!r}; only the assistant's is learned")
    masked = _is_masked(entry, ROLES[role], path, where, learned)
    return Turn(ROLES[role], _content(entry, names[1], path, where), masked, reasoning)


def _content(entry: Mapping[str, Any], name: str, path: str, where: str) -> str:
    """The text of a turn, which may be a list of parts {type: text, text}."""
    parts = entry[name]
    if not isinstance(parts, list):
        return string(entry, name, where, f"{path}.")
    texts = []
    for index, part in enumerate(parts):
        here = f"{path}.{name}[{index}]"
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        if not isinstance(part, dict):
            raise InputError(f"{where}: field '{here}' is {kind_of(part)}, but must be a string or a part {{type, text}}")
        kind = part.get("type", "text")
        if kind != "text" or "text" not in part:
            raise InputError(f"{where}: field '{here}' is a part of type {kind!r}; only parts of type 'text' can be learned")
        refuse(part, IN_TURNS, where, f"{here}.")
        texts.append(string(part, "text", where, f"{here}."))
    return "".join(texts)


def _reasoning(entry: Mapping[str, Any], path: str, where: str) -> str:
    found = {name: text for name in REASONING if (text := optional_string(entry, name, where, f"{path}."))}
    if len(set(found.values())) > 1:
        raise InputError(f"{where}: {path} has {' and '.join(found)}, which differ; keep one of them")
    return next(iter(found.values()), "")


def _is_masked(entry: Mapping[str, Any], role: str, path: str, where: str, learned: bool) -> bool:
    """Whether a turn is not to be learned although its role is."""
    for names, meaning in ((_LEARN, True), (_MASK, False)):
        for name in names:
            value = entry.get(name)
            if value is None:
                continue
            if not (isinstance(value, bool | int | float) and value in (0, 1)):
                raise InputError(
                    f"{where}: {path}.{name} is {value!r}; a turn is learned or not: only 0 and 1, true and false are known"
                )
            learn = bool(value) is meaning
            if learn and role != "assistant" and name in _LEARN:
                raise InputError(
                    f"{where}: {path}.{name} asks to learn a turn of the role {role!r}; only what the assistant says is "
                    "learned"
                )
            learned = learned and learn
    return role == "assistant" and not learned
