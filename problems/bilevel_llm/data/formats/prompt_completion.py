"""`prompt_completion`: `prompt` and `completion`, two strings used as they are, or two lists of messages."""

from collections.abc import Mapping
from typing import Any, ClassVar

from bilevel_llm.data.fields import chat_layout, conversation, string, with_system
from bilevel_llm.data.format import Format
from bilevel_llm.data.layout import CompletionLayout, Layout
from bilevel_llm.data.meaning import IN_CHATS, IN_COMPLETIONS, refuse
from bilevel_llm.data.rows import Row, Turn


class PromptCompletion(Format):
    """The completion is learned: a string, or what the assistant says in a list of messages."""

    name = "prompt_completion"
    required = (("prompt", "completion"),)
    roles: ClassVar[Mapping[str, str]] = {"prompt": "prompt", "response": "completion"}
    refused = IN_CHATS
    version = 2

    def read(self, fields: Mapping[str, Any], where: str) -> tuple[Turn, ...]:
        """See `Format.read`."""
        if isinstance(fields["prompt"], list):
            prompt = conversation(fields, "prompt", where, learned=False)
            return with_system(fields, prompt, where) + conversation(fields, "completion", where)
        refuse(fields, IN_COMPLETIONS, where)
        return Turn("prompt", string(fields, "prompt", where)), Turn("completion", string(fields, "completion", where))

    def layout(self, fields: Mapping[str, Any]) -> Layout:
        """See `Format.layout`."""
        if isinstance(fields["prompt"], list):
            return chat_layout(self, fields, "prompt", "completion")
        return CompletionLayout(self.name, "prompt", "completion")

    def write(self, row: Row) -> dict[str, Any]:
        """See `Format.write`."""
        if [turn.role for turn in row.turns] != ["prompt", "completion"]:
            raise self.refusal(row, "it is not one prompt and one completion that go to the model without a chat template")
        prompt, completion = row.turns
        return {"prompt": prompt.text, "completion": completion.text}
