"""Fields that change what a row means to common trainers, and that are not read here: a row with one of them is refused.

They are those of TRL, axolotl, LLaMA-Factory, torchtune, ms-swift and OpenAI's files. A field that is null, false or empty
says nothing and is allowed: tables have every field in every row.
"""

from collections.abc import Mapping
from typing import Any

from bilevel.errors import InputError

_MEDIA: Mapping[str, str] = {
    name: "something that is no text"
    for name in ("image", "images", "video", "videos", "audio", "audios", "input_audio", "image_url")
}

TOOL_ROLES: Mapping[str, str] = {
    **dict.fromkeys(("tool", "function", "observation", "ipython", "tool_response", "tool_result"), "the answer of a tool"),
    **dict.fromkeys(("function_call", "tool_call"), "the call of a tool"),
}
"""Roles of turns that can only be written together with the calls and the descriptions of tools."""

IN_TURNS: Mapping[str, str] = {
    **_MEDIA,
    "tool_calls": "calls of tools",
    "tool_call": "the call of a tool",
    "function_call": "the call of a tool",
    "tool_call_id": "the call that a tool answers",
    "tool_responses": "answers of tools",
    "tool_plan": "a plan for the use of tools",
    "tools": "descriptions of tools",
    "functions": "descriptions of tools",
    "name": "the name of the speaker",
    "refusal": "a refusal, in place of the answer",
    "prefix": "an answer to be continued",
    "citations": "citations",
    "documents": "documents",
    "train_detail": "weights of parts of the text",
    "training_detail": "weights of parts of the text",
    "loss_scale": "a weight of the text",
    "channel": "the channel of the answer",
    "recipient": "whom the turn addresses",
    "ipython": "whether a tool is called",
}
"""Keys of a turn -> what they hold."""

SYSTEM = ("system", "system_prompt")
"""Fields of a row that may hold a system prompt for its conversation."""

_VERDICTS = ("label", "kto_tag")  # false in one of them says that the answer is bad; other values are allowed

_IN_ROWS: Mapping[str, str] = {
    **_MEDIA,
    "tools": "descriptions of tools",
    "functions": "descriptions of tools",
    "function_call": "the call of a tool",
    "tool_calls": "calls of tools",
    "documents": "documents",
    "chat_template": "a chat template of its own",
    "chat_template_kwargs": "settings of the chat template",
    "chosen": "a preferred answer",
    "rejected": "a worse answer",
    "chosen_response": "a preferred answer",
    "rejected_response": "a worse answer",
    "label": "that the answer is a bad one",
    "kto_tag": "that the answer is a bad one",
    "loss_scale": "a weight of the row",
    "input_ids": "tokens",
}

IN_CHATS: Mapping[str, str] = {**_IN_ROWS, "history": "earlier turns"}
"""Fields of a row that holds a conversation -> what they hold."""

IN_QUESTIONS: Mapping[str, str] = {**_IN_ROWS, "reasoning_content": "reasoning", "thinking": "reasoning"}
"""Fields of a row that holds a question and its answer -> what they hold."""

IN_COMPLETIONS: Mapping[str, str] = {**IN_QUESTIONS, **dict.fromkeys(SYSTEM, "a system prompt"), "history": "earlier turns"}
"""Fields of a row that holds a prompt and its completion, as strings -> what they hold."""

IN_TEXTS: Mapping[str, str] = {**_MEDIA, "input_ids": "tokens"}
"""Fields of a row that holds one text -> what they hold."""


def is_empty(value: Any) -> bool:
    """Whether a field says nothing: null, false, zero, "", [], {}, these as JSON, and lists and objects of such values."""
    match value:
        case list():
            return all(map(is_empty, value))
        case dict():
            return all(map(is_empty, value.values()))
        case str():
            return value.strip() in ("", "[]", "{}", "null")
        case _:
            return not value


def refuse(fields: Mapping[str, Any], refused: Mapping[str, str], where: str, path: str = "") -> None:
    """Raise `InputError` if one of these fields is filled.

    refused: field -> what it holds. path: what precedes the field's name in messages.
    """
    for name in fields:
        if name not in refused:
            continue
        if fields[name] is False if name in _VERDICTS else not is_empty(fields[name]):
            raise InputError(
                f"{where}: field '{path}{name}' holds {refused[name]}, which would not be learned; remove the field if "
                "the row means the same without it, or leave out the row"
            )
