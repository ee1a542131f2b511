"""The record of one step, which is one line of metrics.jsonl, and what follows from a history of steps."""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, overload

import numpy as np
from numpy.typing import NDArray

from bilevel.documents import read_text
from bilevel.errors import DamagedError

SCHEMA = 1
"""The version of the schema of a line; it changes whenever a field does."""


class RecordError(DamagedError):
    """A line that is not the record of a step. Names the file and the line, counted from 1."""

    def __init__(self, file: Path, line: int, reason: str) -> None:
        super().__init__(f"{file}:{line}: {reason}")
        self.file = file
        self.line = line


@dataclass(frozen=True, slots=True)
class Record:
    """The record of one step.

    step: its number, from 0.
    seconds: the wall-clock time that it took.
    upper: the upper variable after the step, as `Problem.summary` gives it.
    moved: whether the step could move the upper variable. It could not in a warm-up.
    metrics: the solver's numbers: `upper_loss`, `lower_loss`, `gap`, `penalty`, and whatever else it reports.
    parts: those of its numbers that have names: `upper_parts`, `lower_parts`, `gap_parts` and others.
    average: the upper variable that the solver takes for its result, where that is a mean of its own over the steps so
        far; empty for a solver that has none.
    active: blocks of the lower variable that trained.
    optimizer_bytes: memory of masters, moments and gradients, on this process.
    size: units (tokens, rows) that went through forward and backward, over all processes.
    """

    step: int
    seconds: float
    upper: Mapping[str, float]
    moved: bool = True
    metrics: Mapping[str, float] = field(default_factory=dict)
    parts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    average: Mapping[str, float] = field(default_factory=dict)
    active: Sequence[str] = ()
    optimizer_bytes: int = 0
    size: int = 0

    __pydantic_config__: ClassVar[Mapping[str, Any]] = {"extra": "forbid"}

    @classmethod
    def of_step(
        cls,
        step: int,
        found: Mapping[str, float | Mapping[str, float]],
        *,
        seconds: float,
        upper: Mapping[str, float],
        active: Sequence[str],
        optimizer_bytes: int,
        size: int,
    ) -> Record:
        """Make a record from what a solver returns (`bilevel.solver.Metrics`) and what the loop knows about the step."""
        metrics = {key: value for key, value in found.items() if not isinstance(value, Mapping)}
        parts = {key: value for key, value in found.items() if isinstance(value, Mapping)}
        moved = not metrics.pop("held", 0.0)
        average = parts.pop("average", {})
        return cls(step, seconds, upper, moved, metrics, parts, average, active, optimizer_bytes, size)

    def named(self, key: str) -> Mapping[str, float]:
        """Numbers by name: `upper`, or the parts of that key; empty where the step has none."""
        return self.upper if key == "upper" else self.parts.get(key, {})

    def number(self, key: str) -> float | None:
        """A metric, `seconds`, `size` or `optimizer_bytes`; None where the step has none."""
        return getattr(self, key) if key in ("seconds", "size", "optimizer_bytes") else self.metrics.get(key)

    def to_json(self) -> str:
        """The record as one line, without the newline."""
        return json.dumps({"schema": SCHEMA, **{f.name: getattr(self, f.name) for f in fields(self)}})

    @classmethod
    def from_json(cls, line: str) -> Record:
        """The inverse of `to_json`. Raises `ValueError` saying what is wrong with the line (`JSONDecodeError`: no JSON)."""
        from pydantic import ValidationError

        content = json.loads(line)
        if not isinstance(content, dict) or "schema" not in content:
            raise ValueError("not the record of a step, which is an object with a key `schema`")
        if (schema := content.pop("schema")) != SCHEMA:
            raise ValueError(f"the record has schema {schema!r}, and this version of bilevel reads schema {SCHEMA}")
        try:
            record: Record = _adapter().validate_python(content)
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"not the record of a step: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
        return record


@cache
def _adapter() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(Record)


def read_records(file: Path, steps: int | None = None) -> list[Record]:
    """The records of metrics.jsonl; none if there is no such file.

    steps: the largest number of records to read. A last line that a run is still writing is left out.

    Raises `DamagedError`, naming the line, for what is no record, and for a step that is missing or there twice.
    """
    if not file.exists():
        return []
    lines = read_text(file).split("\n")  # not `splitlines`, for which more than a newline ends a line
    records: list[Record] = []
    for number, line in enumerate(lines, start=1):
        if len(records) == steps:
            break
        if not line and number == len(lines):
            break
        try:
            record = Record.from_json(line)
        except json.JSONDecodeError as error:
            if number == len(lines):  # no newline follows: the run is writing it
                break
            raise RecordError(file, number, f"not JSON: {error}") from error
        except (ValueError, RecursionError) as error:
            raise RecordError(file, number, str(error)) from error
        if record.step != len(records):
            raise RecordError(file, number, f"the record of step {record.step}, where that of step {len(records)} is due")
        if records and record.upper.keys() != records[0].upper.keys():
            raise RecordError(file, number, "the upper variable has other names than in the first step")
        records.append(record)
    return records


class Records(Sequence[Record]):
    """Records in a form of their own, which are equal to a list of the same ones."""

    __hash__ = None  # type: ignore[assignment]  # a history grows

    def __eq__(self, other: object) -> bool:
        """Whether the records are the same, in whatever kind of sequence."""
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(mine == its for mine, its in zip(self, other, strict=True))


class Steps(Records):
    """Some of the steps of a history, without a copy of their records.

    places: the index of each in the history.
    """

    def __init__(self, history: Sequence[Record], places: Sequence[int]) -> None:
        self._history = history
        self._places = places

    def __len__(self) -> int:
        """The number of these steps."""
        return len(self._places)

    @overload
    def __getitem__(self, place: int) -> Record: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[Record]: ...

    def __getitem__(self, place: int | slice) -> Record | Sequence[Record]:
        """One of them, or a view of several."""
        if isinstance(place, slice):
            return Steps(self._history, self._places[place])
        return self._history[self._places[place]]


def thinned(history: Sequence[Record], most: int) -> list[Record]:
    """At most about `most` of the steps, equally far apart, counted back from the last one, which is among them."""
    every = -(-len(history) // most) or 1
    return list(history[(len(history) - 1) % every :: every])


def total_seconds(history: Sequence[Record]) -> float:
    """The wall-clock time of all steps in seconds, to the millisecond."""
    return round(sum(record.seconds for record in history), 3)


def total_size(history: Sequence[Record]) -> int:
    """Units that went through forward and backward in all steps."""
    return sum(record.size for record in history)


RECENT = 50
"""Steps by which the pace of a run is told: with a solver that goes in rounds, about one round."""


def pace(history: Sequence[Record]) -> float | None:
    """Seconds that a step takes after the warm-up, whose steps take less; None as long as that is not known."""
    recent = history[-RECENT:]
    after = recent[warmup_steps(recent) :]
    return sum(record.seconds for record in after) / len(after) if after else None


def moving(history: Sequence[Record]) -> Sequence[Record]:
    """The steps in which the upper variable could move."""
    return Steps(history, array("q", (place for place, record in enumerate(history) if record.moved)))


def warmup_steps(history: Sequence[Record]) -> int:
    """Steps before the first one that could move the upper variable.

    0 if there is no upper variable, and for a solver that goes in rounds, which holds it again and again.
    """
    if not history or not history[0].upper or "round" in history[0].metrics:
        return 0
    return next((place for place, record in enumerate(history) if record.moved), len(history))


def averaged(history: Sequence[Record]) -> Sequence[Record]:
    """The steps that `average` is taken over.

    The second half of those that could move the upper variable, which is less noisy than the last one and past the way
    from the start; all of them, where the solver has an average of its own. If none could move it: the last step.
    """
    moved = moving(history)
    own = bool(history and history[-1].average)
    return moved[0 if own else len(moved) // 2 :] or history[-1:]


def average(history: Sequence[Record]) -> dict[str, float]:
    """The upper variable that a run arrives at; empty before the first step.

    The solver's own average where it has one, else the mean over the steps `averaged`.
    """
    if not history:
        return {}
    if history[-1].average:
        return dict(history[-1].average)
    names = list(history[-1].upper)
    means = np.ascontiguousarray(upper_table(averaged(history), names).T).mean(axis=1)  # one after another in memory
    return dict(zip(names, means.tolist(), strict=True))


def upper_table(history: Sequence[Record], names: Sequence[str]) -> NDArray[np.float64]:
    """The upper variable after each step. Shape: (steps, names)."""
    values = (record.upper[name] for record in history for name in names)
    return np.fromiter(values, np.float64, len(history) * len(names)).reshape(len(history), len(names))
