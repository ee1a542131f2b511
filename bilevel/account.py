"""What a run says about itself beyond its records: findings, tables, and what its numbers are called (account.json).

All of it is plain data, so that a report needs neither the problem nor the plugin that it came from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from bilevel.errors import InputError

FILE = "account.json"
SCHEMA = 1
"""The version of the format of the file."""

Value = str | int | float | None


@dataclass(frozen=True)
class Finding:
    """Something that a person should know before using a result.

    name: what was looked for, as programs and tables name it, such as "still-moving".
    flagged: whether it is a reason not to trust the result.
    sentence: what was found, with its number, and what to do about it.
    """

    name: str
    flagged: bool
    sentence: str


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
    """What the numbers of a problem's runs are called.

    unit: what the size of a batch counts, in the plural; throughput is in units per second.
    upper: the name of an entry of the upper variable, such as "weight".
    lower_loss, upper_loss: the names of the losses.
    lower_part, upper_part: the name of one of their parts.
    """

    unit: str = "rows"
    upper: str = "name"
    lower_loss: str = "lower loss"
    upper_loss: str = "upper loss"
    lower_part: str = "part"
    upper_part: str = "part"


@dataclass(frozen=True)
class Account:
    """What a run says about itself, up to the last step done.

    steps: the number of steps done when this was written.
    versions: the versions of the packages that did them.
    identity: what the run was about, as plain data (hashes of data and model): runs that differ in it are not compared as
        seeds of one recipe.
    """

    steps: int
    seed: int
    versions: Mapping[str, str]
    labels: Labels = Labels()
    findings: Sequence[Finding] = ()
    tables: Sequence[Table] = ()
    identity: Mapping[str, Any] = field(default_factory=dict)

    __pydantic_config__: ClassVar[Mapping[str, Any]] = {"extra": "forbid"}

    def to_json(self) -> str:
        """The account as the text of the file."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1, ensure_ascii=False)

    @classmethod
    def read(cls, file: Path) -> Account:
        """Raises `InputError` naming the file and the key that is wrong."""
        from pydantic import TypeAdapter, ValidationError

        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{file}: not JSON: {error}") from error
        schema = content.pop("schema", None) if isinstance(content, dict) else None
        if schema != SCHEMA:
            raise InputError(f"{file}: its schema is {schema!r}, but this version of bilevel reads schema {SCHEMA}")
        try:
            return TypeAdapter(cls).validate_python(content)
        except ValidationError as error:
            first = error.errors()[0]
            raise InputError(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
