"""`alpaca`: `instruction`, `output` and, optionally, `input`, which is put below the instruction."""

from collections.abc import Mapping
from typing import Any

from bilevel_llm.data.fields import string
from bilevel_llm.data.format import Format
from bilevel_llm.data.layout import InstructionLayout
from bilevel_llm.data.rows import Row, Turn


class Alpaca(Format):
    """One question and its answer, which is learned."""

    name = "alpaca"
    required = (("instruction", "output"),)

    def read(self, fields: Mapping[str, Any], where: str) -> tuple[Turn, ...]:
        """See `Format.read`."""
        instruction = string(fields, "instruction", where)
        extra = string(fields, "input", where) if fields.get("input") is not None else ""
        output = string(fields, "output", where)
        return Turn("user", f"{instruction}\n\n{extra}" if extra else instruction), Turn("assistant", output)

    def layout(self, fields: Mapping[str, Any]) -> InstructionLayout:
        """See `Format.layout`."""
        return InstructionLayout(self.name, "instruction", "output", "input")

    def write(self, row: Row) -> dict[str, Any]:
        """See `Format.write`. The whole question becomes the instruction."""
        if [turn.role for turn in row.turns] != ["user", "assistant"]:
            raise self.refusal(row, "it is not one question of the user's and one answer")
        question, answer = row.turns
        return {"instruction": question.text, "input": "", "output": answer.text}
