"""What a baseline is: an object whose fields are its settings, with `find`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from bilevel import Active, All, Backend, Finding, Result, Solver, Table
from bilevel.observer import Observer
from bilevel.plain import RECIPE_RULES
from bilevel.record import average, total_seconds
from bilevel.run_settings import RunSettings
from bilevel_llm.reweighting.problem import LLMReweighting


@dataclass(frozen=True)
class Spent:
    """What finding the weights took.

    seconds: wall time, without reading and tokenizing the data.
    tokens: tokens that went forward through a model, without padding, over all processes; a token counts every time that
        it passed through a model, and for each model separately.
    backward_tokens: those of them that also went backward, which costs about two more forward passes.
    """

    seconds: float = 0.0
    tokens: int = 0
    backward_tokens: int = 0


@dataclass(frozen=True, eq=False)
class Selection:
    """Rows that are to be trained on, instead of whole sources.

    scores: source -> the score of every row of its token table; higher is better. Shape: (rows,).
    rows: source -> the selected rows, as indices into its token table.
    """

    scores: Mapping[str, NDArray[np.float64]]
    rows: Mapping[str, NDArray[np.int64]]

    @classmethod
    def best(cls, scores: Mapping[str, NDArray[np.float64]], count: int) -> Selection:
        """The `count` rows with the highest scores over all sources; where scores are equal, the earlier rows."""
        source_of = np.concatenate([np.full(len(s), i) for i, s in enumerate(scores.values())])
        row_of = np.concatenate([np.arange(len(s)) for s in scores.values()])
        best = np.argsort(-np.concatenate(list(scores.values())), kind="stable")[:count]
        return cls(scores, {name: row_of[best[source_of[best] == i]] for i, name in enumerate(scores)})

    @property
    def shares(self) -> dict[str, float]:
        """Source -> its share of the selected rows."""
        total = sum(map(len, self.rows.values()))
        return {name: len(rows) / total for name, rows in self.rows.items()}

    def __iter__(self) -> Iterator[tuple[str, int, float]]:
        """(source, row, score), best first."""
        found = [(name, int(row), float(self.scores[name][row])) for name, rows in self.rows.items() for row in rows]
        return iter(sorted(found, key=lambda entry: -entry[2]))

    def __len__(self) -> int:
        """Number of selected rows."""
        return sum(map(len, self.rows.values()))


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a baseline found.

    weights: source -> weight; the weights are not negative and sum to 1. If rows were selected, a source's weight is its
        share of them.
    cost: what finding the weights took.
    selection: the rows, if single rows were selected.
    trajectory: source -> its weight after each step, if the weights moved.
    notes: what a reader should know before using the weights, one sentence each.
    findings: what was tested; those that are flagged speak against using the weights.
    tables: what `bilevel report` shows of how the weights were found.
    """

    weights: Mapping[str, float]
    cost: Spent = Spent()
    selection: Selection | None = None
    trajectory: Mapping[str, Sequence[float]] = field(default_factory=dict)
    notes: Sequence[str] = ()
    findings: Sequence[Finding] = ()
    tables: Sequence[Table] = ()

    @property
    def all_findings(self) -> list[Finding]:
        """The findings, and after them the notes as findings that are not flagged."""
        return [*self.findings, *(Finding("note", False, note) for note in self.notes)]


@dataclass(frozen=True)
class Task:
    """The data that a baseline is to find weights for, and what it may use.

    problem: already prepared: its model has been found, and its data read and checked.
    backend: where a model may be trained; it has not been started.
    run: the budget (at most `steps` training steps of one model, each on a batch of `problem.batch_size` rows), the seed of
        everything that is random, and the directory in which a baseline may keep metrics and checkpoints; nothing is
        written if `output` is None.
    active: the blocks that train at a step.
    resume: whether to continue from what an earlier, interrupted call left in the directory.
    recipe: what to keep as recipe.yaml.
    observer: is told of every training step.
    """

    problem: LLMReweighting
    backend: Backend
    run: RunSettings
    active: Active = field(default_factory=All)
    resume: bool = False
    recipe: Mapping[str, Any] | None = None
    observer: Observer | None = None

    def train(self, solver: Solver[Any]) -> Result:
        """Run a solver within the budget."""
        return self.run.fit(
            self.problem,
            solver,
            self.backend,
            active=self.active,
            resume=self.resume,
            recipe=self.recipe,
            observer=self.observer,
        )


class Baseline(ABC):
    """A way to find weights or select rows. Subclasses are frozen dataclasses: the fields are the settings.

    Other code knows of a baseline only what the class variables and `most_rows` say.
    """

    __pydantic_config__: ClassVar[Mapping[str, Any]] = RECIPE_RULES

    resumable: ClassVar[bool] = False
    """Whether an interrupted call can be resumed from where it stopped."""
    trains: ClassVar[bool] = True
    """Whether the weights come from a model, and so depend on the seed. False: they follow from the data alone."""

    def most_rows(self, rows: int) -> int | None:
        """The largest number of rows that it selects from all sources' `rows` together; None if it finds weights."""
        return None

    def completed(self, solver: Callable[[], Solver[Any] | None]) -> Self:
        """The same baseline, with what its keys leave to the recipe filled in. By default nothing is left to it.

        solver: gives the recipe's solver, or None if it has none. The section is read, and may be found wrong, only if this
            is called. See `training`.
        """
        return self

    def check(self, task: Task) -> None:  # noqa: B027 (most methods have nothing to check)
        """Raise `InputError` for what the user has to correct, before a model is loaded. By default, nothing is checked."""

    @abstractmethod
    def find(self, task: Task) -> Outcome:
        """Find weights or select rows. It may use nothing but its argument: the same task gives the same outcome."""


def outcome_of_training(result: Result, notes: Sequence[str], findings: Sequence[Finding]) -> Outcome:
    """The outcome of a solver whose steps report `average`, `tokens` and `backward_tokens`; `average` gives the weights."""
    history = result.history
    cost = Spent(
        total_seconds(history),
        sum(int(record.metrics["tokens"]) for record in history),
        sum(int(record.metrics["backward_tokens"]) for record in history),
    )
    trajectory = {name: [record.upper[name] for record in history] for name in history[-1].upper}
    return Outcome(average(history), cost, trajectory=trajectory, notes=notes, findings=findings)
