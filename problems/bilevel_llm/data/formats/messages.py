"""`messages`: a list of {role, content}, as OpenAI and Hugging Face write conversations."""

from collections.abc import Mapping
from typing import Any, ClassVar

from bilevel_llm.data.fields import chat_layout, conversation, with_system, written_turns
from bilevel_llm.data.format import Evidence, Format
from bilevel_llm.data.layout import ChatLayout
from bilevel_llm.data.meaning import IN_CHATS
from bilevel_llm.data.rows import Row, Turn


class Messages(Format):
    """A conversation, of which everything that the assistant says is learned, but for turns that say otherwise."""

    name = "messages"
    required = (("messages",),)
    roles: ClassVar[Mapping[str, str]] = {"messages": "messages", "system": "system"}
    evidence = Evidence.TURNS
    refused = IN_CHATS
    version = 2

    def read(self, fields: Mapping[str, Any], where: str) -> tuple[Turn, ...]:
        """See `Format.read`."""
        return with_system(fields, conversation(fields, "messages", where), where)

    def layout(self, fields: Mapping[str, Any]) -> ChatLayout:
        """See `Format.layout`."""
        return chat_layout(self, fields, "messages")

    def write(self, row: Row) -> dict[str, Any]:
        """See `Format.write`."""
        return {"messages": written_turns(self, row, "role", "content", in_full=True)}
