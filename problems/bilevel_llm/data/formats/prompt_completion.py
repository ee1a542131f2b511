"""`prompt_completion`: `prompt` and `completion`, two strings used as they are, or two lists of messages."""

from collections.abc import Mapping
from typing import Any

from bilevel_llm.data.fields import chat_layout, conversation, string
from bilevel_llm.data.format import Format
from bilevel_llm.data.layout import CompletionLayout, Layout
from bilevel_llm.data.rows import Row, Turn


class PromptCompletion(Format):
    """Of two strings, the completion is learned; of two lists of messages, everything that the assistant says in both."""

    name = "prompt_completion"
    required = (("prompt", "completion"),)

    def read(self, fields: Mapping[str, Any], where: str) -> tuple[Turn, ...]:
        """See `Format.read`."""
        if isinstance(fields["prompt"], list):
            return conversation(fields, "prompt", where) + conversation(fields, "completion", where)
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
