"""What a format of rows is: the base class of all of them.

A plugin adds one by the hook `bilevel_formats`, as this package adds its own (`bilevel_llm.data.formats`):

    class QuestionAnswer(Format):
        name = "question_answer"
        required = (("question", "answer"),)

        def read(self, fields: Mapping[str, Any], where: str) -> tuple[Turn, ...]:
            return Turn("user", string(fields, "question", where)), Turn("assistant", string(fields, "answer", where))

        def layout(self, fields: Mapping[str, Any]) -> Layout:
            return InstructionLayout(self.name, "question", "answer")

`bilevel_llm.data.fields` has the functions that take a string or a list of turns out of a row and complain if there is none.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from enum import IntEnum
from typing import Any, ClassVar

from bilevel.errors import InputError
from bilevel_llm.data.layout import Layout
from bilevel_llm.data.rows import Row, Turn


class Evidence(IntEnum):
    """How much the names of a row's fields say about its format. The format with the most is taken."""

    NONE = 0
    """The row lacks a field that the format needs."""
    ONE_NAME = 1
    """One field, of a name that rows of other formats have as well: chat data often carries a rendered `text`."""
    SEVERAL_NAMES = 2
    """Several fields that are found together in this format."""
    TURNS = 3
    """A field that holds the whole conversation."""


class Format(ABC):
    """How the turns of a row are written in its fields. One object serves all rows, so it has no state.

    name: what recipes call it; it is registered under the same name.
    required: the fields that a row must have; alternatives, each a tuple of names. Other fields may be there as well.
    evidence: what it means that a row has them.
    version: to be raised whenever the same row is read as other turns than before, so that cached tokens are made again.
    """

    name: ClassVar[str]
    required: ClassVar[tuple[tuple[str, ...], ...]]
    evidence: ClassVar[Evidence] = Evidence.SEVERAL_NAMES
    version: ClassVar[int] = 1

    def fits(self, fields: Mapping[str, Any]) -> bool:
        """Whether a row has the fields that the format needs. Asked for every row."""
        for alternative in self.required:
            for name in alternative:
                if name not in fields:
                    break
            else:
                return True
        return False

    def detect(self, fields: Mapping[str, Any]) -> int:
        """How much speaks for this format; 0 if a row with these fields cannot be in it. Asked for a file's first row."""
        return self.evidence if self.fits(fields) else Evidence.NONE

    @abstractmethod
    def read(self, fields: Mapping[str, Any], where: str) -> tuple[Turn, ...]:
        """The turns of a row that fits. Their roles say what is learned (see `Turn`).

        where: the row's file and line, for messages.

        Raises `InputError` for a field of another type than the format needs.
        """

    @abstractmethod
    def layout(self, fields: Mapping[str, Any]) -> Layout:
        """In which fields the turns of a row that fits are.

        Trainers are told so, and learn all that the assistant says: a format that masks turns gives a plain `Layout`.
        """

    def write(self, row: Row) -> dict[str, Any]:
        """The fields of a row that is read as these turns.

        Raises `InputError` for a row that cannot be written so that the same is learned from it, and in a format that does
        not write at all.
        """
        raise self.refusal(row, "this format can only be read")

    def refusal(self, row: Row, reason: str) -> InputError:
        """What `write` raises."""
        return InputError(
            f"{row.where}: the row cannot be written in format {self.name!r}: {reason}; use --format source "
            "(for which all sources need one layout)"
        )
