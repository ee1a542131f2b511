"""`sharegpt`: `conversations` or `items`, a list of {from, value}, and optionally `system`."""

from collections.abc import Mapping
from typing import Any, ClassVar

from bilevel_llm.data.fields import chat_layout, conversation, with_system, written_turns
from bilevel_llm.data.format import Evidence, Format
from bilevel_llm.data.layout import ChatLayout
from bilevel_llm.data.meaning import IN_CHATS
from bilevel_llm.data.rows import Row, Turn


class ShareGPT(Format):
    """A conversation, of which everything that the assistant says is learned, but for turns that say otherwise."""

    name = "sharegpt"
    required = (("conversations",), ("items",))
    roles: ClassVar[Mapping[str, str]] = {"messages": "conversations", "system": "system"}
    evidence = Evidence.TURNS
    refused = IN_CHATS
    version = 2

    def read(self, fields: Mapping[str, Any], where: str) -> tuple[Turn, ...]:
        """See `Format.read`."""
        return with_system(fields, conversation(fields, _field(fields), where), where)

    def layout(self, fields: Mapping[str, Any]) -> ChatLayout:
        """See `Format.layout`."""
        return chat_layout(self, fields, _field(fields))

    def write(self, row: Row) -> dict[str, Any]:
        """See `Format.write`."""
        return {"conversations": written_turns(self, row, "from", "value", {"user": "human", "assistant": "gpt"})}


def _field(fields: Mapping[str, Any]) -> str:
    return "conversations" if "conversations" in fields else "items"
