"""A row of data as turns, whatever file and format it came in."""

import hashlib
import unicodedata
from dataclasses import dataclass

CHAT_ROLES = frozenset({"system", "user", "assistant"})
"""Roles of the turns of a conversation, which a chat template writes out."""

RAW_ROLES = frozenset({"prompt", "completion", "text"})
"""Roles of the turns of a row that goes to the model as it is, without a chat template."""

_LEARNED_ROLES = frozenset({"assistant", "completion", "text"})

PROVENANCE = "_bilevel"
"""The field of a mixed row that says where it is from and how it is read: {source, file, row, repeat, format}."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One text of a row.

    role: "system", "user" or "assistant" in a conversation; "prompt" and "completion", or "text", in a row that goes to
        the model as it is, without a chat template.
    masked: True for a text that is not to be learned although its role is: an earlier answer that is known to be bad.
    reasoning: what the assistant thinks before it answers, where the row has it in a field of its own. It is learned with
        the answer; where it is written is up to the chat template.
    """

    role: str
    text: str
    masked: bool = False
    reasoning: str = ""

    @property
    def learned(self) -> bool:
        """Whether the model learns to write this text: what the assistant says, a completion or a text."""
        return self.role in _LEARNED_ROLES and not self.masked


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a data file.

    turns: never empty, and at least one of them is learned. In a row without a chat template that is the last one alone.
    where: "file:line", the line on which the row starts. Where rows have no lines of their own (parquet, saved data
        sets, an array written on one line) it is the row's number, from 1.
    """

    turns: tuple[Turn, ...]
    where: str

    @property
    def is_chat(self) -> bool:
        """Whether the row is a conversation, which a chat template writes out."""
        return self.turns[0].role in CHAT_ROLES


def fingerprint(row: Row) -> int:
    """64 bits that two rows share if their texts are equal once normalized; roles and file formats do not matter.

    Normalized: Unicode NFKC, case folded, every run of white space one space, none at the ends.
    """
    parts = (part for turn in row.turns for part in ([turn.reasoning, turn.text] if turn.reasoning else [turn.text]))
    texts = (" ".join(unicodedata.normalize("NFKC", part).casefold().split()) for part in parts)
    return int.from_bytes(hashlib.blake2b("\0".join(texts).encode(), digest_size=8).digest(), "little")
