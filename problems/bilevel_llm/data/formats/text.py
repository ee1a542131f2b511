"""`text`: a string to learn as it is."""

from collections.abc import Mapping
from typing import Any, ClassVar

from bilevel_llm.data.fields import string
from bilevel_llm.data.format import Evidence, Format
from bilevel_llm.data.layout import TextLayout
from bilevel_llm.data.meaning import IN_TEXTS
from bilevel_llm.data.rows import Row, Turn


class Text(Format):
    """A text without a question; all of it is learned."""

    name = "text"
    required = (("text",),)
    roles: ClassVar[Mapping[str, str]] = {"text": "text"}
    evidence = Evidence.ONE_NAME
    refused = IN_TEXTS
    version = 2

    def read(self, fields: Mapping[str, Any], where: str) -> tuple[Turn, ...]:
        """See `Format.read`."""
        return (Turn("text", string(fields, "text", where)),)

    def layout(self, fields: Mapping[str, Any]) -> TextLayout:
        """See `Format.layout`."""
        return TextLayout(self.name, "text")

    def write(self, row: Row) -> dict[str, Any]:
        """See `Format.write`."""
        if [turn.role for turn in row.turns] != ["text"]:
            raise self.refusal(row, "it is more than one text")
        return {"text": row.turns[0].text}
