"""What a format of rows is: the base class of all formats.

A plugin adds a format through the hook `bilevel_formats`, just as this package adds its own (`bilevel_llm.data.formats`):

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
    """How much the names of a row's fields say about its format. The format with the most evidence is taken."""

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

    name: the name of the format in recipes, under which it is registered.
    required: the fields that a row must have, as alternatives, each a tuple of names. A row may have other fields as well.
    roles: what the key `fields` of a recipe calls a field -> the field: the roles that formats share are prompt, response,
        input, system, messages and text.
    evidence: how much it says about the format that a row has these fields.
    refused: fields that would change what a row means, and which the format does not read -> what they hold. A row in which
        one of them is filled is refused: to leave it out would teach something else than the row says.
    version: a number to raise whenever the same row is read differently from before, so that cached tokens are made again.
    """

    name: ClassVar[str]
    required: ClassVar[tuple[tuple[str, ...], ...]]
    roles: ClassVar[Mapping[str, str]] = {}
    evidence: ClassVar[Evidence] = Evidence.SEVERAL_NAMES
    refused: ClassVar[Mapping[str, str]] = {}
    version: ClassVar[int] = 1

    def fits(self, fields: Mapping[str, Any]) -> bool:
        """Whether a row has the fields that the format needs. Called for every row."""
        for alternative in self.required:
            for name in alternative:
                if name not in fields:
                    break
            else:
                return True
        return False

    def detect(self, fields: Mapping[str, Any]) -> int:
        """How much speaks for this format; 0 if a row with these fields cannot be in it. Called for a file's first row."""
        return self.evidence if self.fits(fields) else Evidence.NONE

    @abstractmethod
    def read(self, fields: Mapping[str, Any], where: str) -> tuple[Turn, ...]:
        """The turns of a row that fits. Their roles say what is learned (see `Turn`).

        where: the row's file and line, for messages.

        Raises `InputError` for a field whose type is not the one that the format needs.
        """

    @abstractmethod
    def layout(self, fields: Mapping[str, Any]) -> Layout:
        """The fields that hold the turns of a row that fits.

        Exporters pass this on to trainers, which learn everything that the assistant says; a format that masks turns
        returns a plain `Layout`.
        """

    def write(self, row: Row) -> dict[str, Any]:
        """The fields of a row that would be read as the same turns.

        Raises `InputError` for a row that cannot be written without changing what is learned from it, and in a format that
        cannot write at all.
        """
        raise self.refusal(row, "this format can only be read")

    def refusal(self, row: Row, reason: str) -> InputError:
        """The error that `write` raises."""
        return InputError(
            f"{row.where}: the row cannot be written in format {self.name!r}: {reason}; use --format source "
            "(for which all sources need one layout)"
        )
