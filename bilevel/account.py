"""What a run says of itself beyond its records: findings, tables, and what its numbers are called (account.json).

All of it is plain data, so that a report needs neither the problem nor the plugin that it came from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from bilevel.documents import read_json, validated
from bilevel.errors import DamagedError

FILE = "account.json"
SCHEMA = 1
"""The version of the file's schema."""

Value = str | int | float | None


@dataclass(frozen=True)
class Finding:
    """Something that a person should know before using a result.

    name: a short name of what was looked for, such as "still-moving", for programs and tables.
    flagged: whether it is a reason not to trust the result.
    sentence: what was found, with its number, and what to do about it.
    passed: whether it is a test that could have failed, with a known rate of errors, and did not. Nothing else gets a tick.
    """

    name: str
    flagged: bool
    sentence: str
    passed: bool = False


Decision = Literal["use", "run longer", "do not use"]


@dataclass(frozen=True)
class Verdict:
    """What to do with the result of a run.

    decision: use it, run longer, or do not use it.
    reason: why, and for "do not use" the remedy.
    steps: for "run longer", the total number of steps after which the run should have an answer.
    """

    decision: Decision
    reason: str
    steps: int | None = None

    def sentence(self) -> str:
        """The verdict in one sentence."""
        if self.decision == "use":
            return f"use these weights: {self.reason}"
        if self.decision == "do not use":
            return f"do not use these weights: {self.reason}"
        return f"run longer, to about {self.steps} steps: {self.reason}"


RUN, HERE = "{run}", "{here}/"
"""In commands: the run directory, at the beginning of a word; and the directory to which the recipe's paths are relative."""


@dataclass(frozen=True)
class NextStep:
    """A command that makes sense after a run.

    purpose: what it does, in a few words, such as "draw a data set by these weights".
    words: the command line, word by word. A word may begin with `RUN`, and relative paths in it, with `HERE`, so that the
        command is right also after the run was moved.
    """

    purpose: str
    words: Sequence[str]


@dataclass(frozen=True)
class Table:
    """A table for the report.

    rows: a value for every column; numbers are formatted by the report, and None is an empty cell.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Value]]


@dataclass(frozen=True)
class Labels:
    """The names of the numbers of a problem's runs.

    unit: the unit in which the size of a batch is counted, in the plural; throughput is in units per second.
    upper: the name for an entry of the upper variable.
    lower_loss, upper_loss: the names of the losses.
    lower_part, upper_part: the names for one of their parts.
    """

    unit: str = "rows"
    upper: str = "name"
    lower_loss: str = "lower loss"
    upper_loss: str = "upper loss"
    lower_part: str = "part"
    upper_part: str = "part"


@dataclass(frozen=True)
class Account:
    """What a run says about itself, as far as it is done.

    steps: the steps that were done when this was written.
    versions: the versions of the packages that did it.
    identity: the data and the model, as plain data (their hashes). Runs that differ in it are not compared as seeds.
    verdict: what to do with the result; None if the problem does not say.
    intervals: name -> the ends of the 95% interval of an entry of the upper variable; empty where none is justified.
    next_steps: what to do next, the best first.
    """

    steps: int
    seed: int
    versions: Mapping[str, str]
    labels: Labels = Labels()
    findings: Sequence[Finding] = ()
    tables: Sequence[Table] = ()
    identity: Mapping[str, Any] = field(default_factory=dict)
    verdict: Verdict | None = None
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    next_steps: Sequence[NextStep] = ()

    __pydantic_config__: ClassVar[Mapping[str, Any]] = {"extra": "forbid"}

    def to_json(self) -> str:
        """The text of the file."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1, ensure_ascii=False)

    @classmethod
    def read(cls, file: Path) -> Account:
        """Raises `DamagedError` naming the file and the key that is wrong."""
        content = read_json(file, dict[str, Any])
        schema = content.pop("schema", None)
        if schema != SCHEMA:
            raise DamagedError(f"{file}: its schema is {schema!r}, and this version of bilevel reads schema {SCHEMA}")
        return validated(file, content, cls)
