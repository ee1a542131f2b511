"""`sharegpt`: `conversations` or `items`, a list of {from, value}."""

from collections.abc import Mapping
from typing import Any

from bilevel_llm.data.fields import chat_layout, conversation, written_turns
from bilevel_llm.data.format import Evidence, Format
from bilevel_llm.data.layout import ChatLayout
from bilevel_llm.data.rows import Row, Turn


class ShareGPT(Format):
    """A conversation, of which everything that the assistant says is learned."""

    name = "sharegpt"
    required = (("conversations",), ("items",))
    evidence = Evidence.TURNS

    def read(self, fields: Mapping[str, Any], where: str) -> tuple[Turn, ...]:
        """See `Format.read`."""
        return conversation(fields, _field(fields), where)

    def layout(self, fields: Mapping[str, Any]) -> ChatLayout:
        """See `Format.layout`."""
        return chat_layout(self, fields, _field(fields))

    def write(self, row: Row) -> dict[str, Any]:
        """See `Format.write`."""
        return {"conversations": written_turns(self, row, "from", "value", {"user": "human", "assistant": "gpt"})}


def _field(fields: Mapping[str, Any]) -> str:
    return "conversations" if "conversations" in fields else "items"
