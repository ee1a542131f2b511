"""Which fields of a row hold its turns, as a trainer that reads the file must be told.

Rows of one file have one layout. It says more than the format does: rows of `messages` may name a turn's keys `role` and
`content`, or `from` and `value`. There is one class for each way in which rows are written; a format whose rows are
written in none of them gives a `Layout` of its own, and trainers cannot be told how to read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

ROLES: Mapping[str, str] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
"""Names of roles in files -> the three roles of a conversation."""


@dataclass(frozen=True)
class Layout:
    """Where the texts of a row are. Rows of one layout have them in the same fields.

    format: name of the format, for messages and for reading the rows again.
    """

    format: str

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields that are read; a row may lack some of them."""
        return ()

    def renamed(self, columns: Mapping[str, str]) -> Layout:
        """The layout of the same rows in a file whose columns have other names, if trainers can be told it.

        columns: field -> column; no other column is read.
        """
        return Layout(self.format)

    def __str__(self) -> str:
        return self.format


@dataclass(frozen=True)
class ChatLayout(Layout):
    """A conversation: lists of turns.

    fields: the fields that hold a list of turns each, in the order of the conversation. Usually it is one.
    role, text: the keys of a turn.
    roles: the names of roles in the file -> the roles.
    """

    fields: tuple[str, ...]
    role: str
    text: str
    roles: Mapping[str, str] = field(default_factory=lambda: ROLES, compare=False)

    @property
    def columns(self) -> tuple[str, ...]:
        """See `Layout.columns`."""
        return self.fields

    def renamed(self, columns: Mapping[str, str]) -> Layout:
        """See `Layout.renamed`."""
        return replace(self, fields=tuple(columns[field] for field in self.fields))

    def __str__(self) -> str:
        return f"{self.format} ({' and '.join(self.fields)} of {self.role} and {self.text})"


@dataclass(frozen=True)
class InstructionLayout(Layout):
    """A question and its answer, in fields of their own, to be put into a chat template.

    instruction, output: the fields of the two.
    input: a field whose text, if there is any, appears below the instruction; None if the format has none.
    """

    instruction: str
    output: str
    input: str | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """See `Layout.columns`."""
        names = (self.instruction, self.input, self.output)
        return tuple(name for name in names if name is not None)

    def renamed(self, columns: Mapping[str, str]) -> Layout:
        """See `Layout.renamed`."""
        extra = None if self.input is None else columns.get(self.input)
        return replace(self, instruction=columns[self.instruction], output=columns[self.output], input=extra)


@dataclass(frozen=True)
class CompletionLayout(Layout):
    """A prompt and its completion, two strings that go to the model without a chat template.

    prompt, completion: the fields of the two.
    """

    prompt: str
    completion: str

    @property
    def columns(self) -> tuple[str, ...]:
        """See `Layout.columns`."""
        return (self.prompt, self.completion)

    def renamed(self, columns: Mapping[str, str]) -> Layout:
        """See `Layout.renamed`."""
        return replace(self, prompt=columns[self.prompt], completion=columns[self.completion])


@dataclass(frozen=True)
class TextLayout(Layout):
    """A text that is learned as it is.

    field: the field of the text.
    """

    field: str

    @property
    def columns(self) -> tuple[str, ...]:
        """See `Layout.columns`."""
        return (self.field,)

    def renamed(self, columns: Mapping[str, str]) -> Layout:
        """See `Layout.renamed`."""
        return replace(self, field=columns[self.field])
