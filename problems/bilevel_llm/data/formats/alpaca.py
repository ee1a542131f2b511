"""`alpaca`: `instruction`, `output` and, optionally, `input`, `system` and `history`.

`input` is put below the instruction, `system` before everything; `history` is a list of earlier questions and answers, which
are learned too, as LLaMA-Factory has it.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from bilevel.errors import InputError
from bilevel_llm.data.fields import optional_string, string, with_system
from bilevel_llm.data.format import Format
from bilevel_llm.data.layout import InstructionLayout
from bilevel_llm.data.meaning import IN_QUESTIONS
from bilevel_llm.data.rows import Row, Turn
from bilevel_llm.data.wording import kind_of


class Alpaca(Format):
    """A question and its answer, which is learned."""

    name = "alpaca"
    required = (("instruction", "output"),)
    roles: ClassVar[Mapping[str, str]] = {
        "prompt": "instruction",
        "response": "output",
        "input": "input",
        "system": "system",
    }
    refused = IN_QUESTIONS
    version = 2

    def read(self, fields: Mapping[str, Any], where: str) -> tuple[Turn, ...]:
        """See `Format.read`."""
        instruction = string(fields, "instruction", where)
        extra = optional_string(fields, "input", where)
        output = string(fields, "output", where)
        question = Turn("user", f"{instruction}\n\n{extra}" if extra else instruction)
        return with_system(fields, (*_history(fields, where), question, Turn("assistant", output)), where)

    def layout(self, fields: Mapping[str, Any]) -> InstructionLayout:
        """See `Format.layout`."""
        return InstructionLayout(self.name, "instruction", "output", "input")

    def write(self, row: Row) -> dict[str, Any]:
        """See `Format.write`. The whole question becomes the instruction."""
        if [turn.role for turn in row.turns] != ["user", "assistant"]:
            raise self.refusal(row, "it is not one question of the user's and one answer")
        question, answer = row.turns
        if answer.reasoning:
            raise self.refusal(row, "its answer has reasoning, which the format cannot hold")
        return {"instruction": question.text, "input": "", "output": answer.text}


def _history(fields: Mapping[str, Any], where: str) -> list[Turn]:
    history = fields.get("history") or []
    if not isinstance(history, list):
        raise InputError(f"{where}: field 'history' is {kind_of(history)}, but must be a list of [question, answer]")
    turns: list[Turn] = []
    for index, pair in enumerate(history):
        if not (isinstance(pair, list) and len(pair) == 2):
            raise InputError(f"{where}: history[{index}] must be a list of two strings, a question and its answer")
        said = dict(zip(("[0]", "[1]"), pair, strict=True))
        path = f"history[{index}]"
        turns += [Turn("user", string(said, "[0]", where, path)), Turn("assistant", string(said, "[1]", where, path))]
    return turns
