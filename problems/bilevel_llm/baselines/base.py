"""What a way to weigh or select training data is: an object whose fields are its settings, with `weigh`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from bilevel import Active, All, Backend, Result, Solver, fit
from bilevel.loop import Observer
from bilevel.plain import RECIPE_RULES
from bilevel.record import average, total_seconds
from bilevel_llm.reweighting.problem import LLMReweighting


@dataclass(frozen=True)
class Cost:
    """What finding the weights took.

    seconds: wall time, without reading and tokenising the data.
    tokens: tokens that went forward through a model, padding left out, over all processes; a token counts as often as it
        passed, and once for each model.
    backward_tokens: those of them that went backward too, which costs about twice a forward pass more.
    """

    seconds: float = 0.0
    tokens: int = 0
    backward_tokens: int = 0


@dataclass(frozen=True, eq=False)
class Selection:
    """Rows that are to be trained on, in place of whole sources.

    scores: source -> score of every row of its token table, higher is better. Shape: (rows,).
    rows: source -> the selected rows, as indices into its token table.
    """

    scores: Mapping[str, NDArray[np.float64]]
    rows: Mapping[str, NDArray[np.int64]]

    @classmethod
    def best(cls, scores: Mapping[str, NDArray[np.float64]], count: int) -> Selection:
        """The `count` rows with the highest scores over all sources; of equal ones, the earlier."""
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
    """What a weighting found.

    weights: source -> weight, not negative, summing to 1. Of a selection: the source's share of the selected rows.
    cost: what it took.
    selection: the rows, if single rows were selected.
    trajectory: source -> its weight after each step, if they moved.
    notes: what a reader should know before using the weights, one sentence each.
    """

    weights: Mapping[str, float]
    cost: Cost = Cost()
    selection: Selection | None = None
    trajectory: Mapping[str, Sequence[float]] = field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Task:
    """What is to be weighed, and with what.

    problem: prepared: its model is found, its data read and checked.
    backend: where a model may be trained; not started.
    steps: the budget: at most so many training steps, each on a batch of `problem.batch_size` rows.
    seed: of everything random.
    active: which blocks train at a step.
    directory: the run directory, where a method may keep metrics and checkpoints; None: nothing is written.
    resume: go on from what an earlier, interrupted call left in `directory`.
    recipe: what to keep as recipe.yaml.
    observer: told of training steps.
    """

    problem: LLMReweighting
    backend: Backend
    steps: int
    seed: int = 0
    active: Active = field(default_factory=All)
    directory: Path | None = None
    resume: bool = False
    checkpoint_every: int | None = None
    keep_checkpoints: int = 2
    recipe: Mapping[str, Any] | None = None
    observer: Observer | None = None

    def train(self, solver: Solver[Any]) -> Result:
        """Run a solver within the budget."""
        return fit(
            self.problem,
            solver,
            self.backend,
            steps=self.steps,
            seed=self.seed,
            active=self.active,
            output=self.directory,
            checkpoint_every=self.checkpoint_every,
            keep_checkpoints=self.keep_checkpoints,
            resume=self.resume,
            recipe=self.recipe,
            observer=self.observer,
        )


class Weighting(ABC):
    """A way to weigh or select training data. Subclasses are frozen dataclasses: the fields are the settings."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = RECIPE_RULES

    resumable: ClassVar[bool] = False
    """Whether an interrupted call can go on where it stopped."""

    def check(self, task: Task) -> None:  # noqa: B027 (most methods have nothing to check)
        """Raise `InputError` for what the user has to mend, before a model is loaded. Checks nothing by default."""

    @abstractmethod
    def weigh(self, task: Task) -> Outcome:
        """Find the weights, or select rows. May use nothing but its argument: the same task gives the same outcome."""


def outcome_of_training(result: Result, notes: Sequence[str]) -> Outcome:
    """The outcome of a solver whose steps report `average`, `tokens` and `backward_tokens`; its average is the result."""
    history = result.history
    cost = Cost(
        total_seconds(history),
        sum(int(record.metrics["tokens"]) for record in history),
        sum(int(record.metrics["backward_tokens"]) for record in history),
    )
    trajectory = {name: [record.upper[name] for record in history] for name in history[-1].upper}
    return Outcome(average(history), cost, trajectory=trajectory, notes=notes)
