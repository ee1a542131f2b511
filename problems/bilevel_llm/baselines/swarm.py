"""Swarm: Liu et al., "RegMix: Data Mixture as Regression for Language Model Pre-training" (ICLR 2025, arXiv 2407.01492).

    p_1, ..., p_N ~ Dirichlet(a π);   train a model on each mix for K steps;   L_j: its validation loss
    fit a law L(p) to the pairs (p_j, L_j);   the result is the p with the smallest L(p)

π is a prior over the sources. RegMix fits a linear law or boosted trees to hundreds of runs of small models trained from
random weights; here a few short runs of the model itself start from its weights, and the law is that of `mixing_law`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from bilevel import Finding, InputError, Solver, Table
from bilevel.data import generator
from bilevel.optimizer import Optimizer
from bilevel.record import Record, total_seconds, total_size
from bilevel.schedule import Schedule
from bilevel.solvers.shared import require_positive
from bilevel_llm.baselines.base import Baseline, Outcome, Spent, Task
from bilevel_llm.baselines.learning import nothing_learned
from bilevel_llm.baselines.mixing_law import Fit, fitted
from bilevel_llm.baselines.swarm_runs import EachRunAlike, OneAfterAnother, SwarmRuns, set_shares
from bilevel_llm.baselines.training import LowerTraining, chosen_training
from bilevel_llm.reweighting.problem import LLMReweighting, Start
from bilevel_llm.reweighting.source_weights import named_distribution

MIXES = 33
"""The stream of random numbers that draws the mixes; see `bilevel.data.Stream`."""

STEPS = 40  # the length of a run, unless run.steps is less: runs are many, and the order of mixes shows early
ENOUGH = 0.5  # of the variance of losses of runs that the law has not seen; a law that explains less is not to be used


@dataclass(frozen=True)
class Swarm(Baseline):
    """Find weights by short runs on random mixes and a law of their validation losses.

    runs: N. None: four for each source and eight more, so that a law with one slope for each source is overdetermined about
        four times. The first run is on the prior itself.
    steps: K, the steps of each run. None: run.steps, but at most 40. All runs together take N * K steps, which is more than
        run.steps; what they took is in the result's cost.
    prior: π: "uniform", "size" (in proportion to the numbers of rows, as in the paper), or a weight for each source.
    concentration: a = concentration * (number of sources). 1 with a uniform prior draws all mixes with equal probability;
        larger values draw mixes nearer to the prior. 2 keeps off the edges: where a source is nearly absent, the loss of
        what it teaches shoots up, and a single such run would bend the law everywhere. The paper varies it widely, down to
        mixes of nearly a single source.
    ridge: the penalty of the regression, as a part of its squared error. 0.001 costs coefficients that the runs determine
        0.1%, and keeps the others from growing.
    floor: the smallest weight of the result for every source.
    at_most: the largest weight of the result, for every source or by source. A source of which there is little should not
        get more than its rows can bear.
    lr, optimizer: the step size and optimizer of every run. None takes those of the recipe's solver; 1e-5 and AdamW without
        one. A schedule begins anew with each run.

    All runs start from the same weights, see the rows of a source in the same order, and train the same blocks, so that they
    differ by their mixes alone. The best mix is found by a convex solver, not, as in the paper, among random mixes.
    """

    runs: int | None = None
    steps: int | None = None
    prior: Start = "uniform"
    concentration: float = 2.0
    ridge: float = 0.001
    floor: float = 0.0
    at_most: float | dict[str, float] = 1.0
    lr: Schedule | None = None
    optimizer: Optimizer | None = None

    resumable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("runs", "steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 < self.concentration < float("inf"):
            raise ValueError(f"concentration must be positive and finite, not {self.concentration}")
        if not 0 < self.ridge < float("inf"):
            raise ValueError(f"ridge must be positive and finite, not {self.ridge}")
        if self.lr is not None:
            require_positive("lr", self.lr)

    def completed(self, solver: Callable[[], Solver[Any] | None]) -> Self:
        """With the step size and the optimizer of the recipe's solver, where its own are not given."""
        training = self._training(solver)
        return dataclasses.replace(self, lr=training.lr, optimizer=training.optimizer)

    def check(self, task: Task) -> None:
        """There must be enough runs for the law, a prior over the sources, and a mix within the bounds."""
        sources = len(task.problem.source_tables)
        if self._runs(task) < sources + 2:
            raise InputError(
                f"swarm: {self._runs(task)} runs do not determine a law of {sources} sources; set baseline.runs to at least "
                f"{sources + 2}, or leave it out for {4 * sources + 8}"
            )
        self._prior(task.problem)
        least, most = self._bounds(task.problem)
        if least.sum() > 1 + 1e-9 or most.sum() < 1 - 1e-9 or (least > most).any():
            raise InputError(
                f"swarm: no mix of {sources} sources has weights from baseline.floor={self.floor:g} to baseline.at_most: "
                f"the lower bounds sum to {least.sum():.3g}, the upper ones to {most.sum():.3g}, and a mix sums to 1"
            )

    def find(self, task: Task) -> Outcome:
        """Carry out the runs, fit the law, and find the best mix by it."""
        problem, length = task.problem, self._length(task)
        mixes, training = self.mixes(task), self._training()
        result = dataclasses.replace(task.run, steps=len(mixes) * length).fit(
            SwarmRuns(problem, mixes, length),
            OneAfterAnother(training.lr, training.optimizer),
            task.backend,
            active=EachRunAlike(task.active, length),
            resume=task.resume,
            recipe=task.recipe,
            observer=task.observer,
        )
        history = result.history
        findings = nothing_learned("swarm", "models", _mean_run(history, length), training.words)
        outcome = self.weighed(problem, mixes, result.x["losses"].double().numpy())
        trained = total_size(history)
        scored = len(mixes) * sum(len(table.ids) for table in problem.validation_tables.values())
        return dataclasses.replace(
            outcome,
            cost=Spent(total_seconds(history), trained + scored, trained),
            findings=[*findings, *outcome.findings],
        )

    def mixes(self, task: Task) -> NDArray[np.float64]:
        """The mixes of the runs: the prior, and what is drawn around it. Shape: (runs, sources).

        Each is a function of the seed and its number, so that more runs leave the first ones as they are.
        """
        prior = self._prior(task.problem)
        spread = self.concentration * len(prior) * prior
        drawn = [generator(task.run.seed, MIXES, run).dirichlet(spread) for run in range(1, self._runs(task))]
        return np.array([prior, *drawn])

    def weighed(self, problem: LLMReweighting, mixes: NDArray[np.float64], losses: NDArray[np.float64]) -> Outcome:
        """The best mix by the law of these losses, and how far to trust it. losses: of rows. Shape: (runs, rows)."""
        names = list(problem.source_tables)
        law, fit = fitted(mixes, validation_losses(problem, losses), self.ridge)
        best = law.best(self._prior(problem), *self._bounds(problem))
        predicted = float(law.losses(best[None])[0])
        notes = [
            f"the law predicts a validation loss of {predicted:.4f} for these weights after a run of this length; the run "
            f"on the prior had {fit.measured[0]:.4f}, the best of {len(mixes)} runs {fit.measured.min():.4f}"
        ]
        table = Table(
            "Runs of the swarm",
            ("run", *names, "validation loss", "predicted by the others"),
            [
                (run + 1, *mix.tolist(), float(loss), float(guess))
                for run, (mix, loss, guess) in enumerate(zip(mixes, fit.measured, fit.predicted, strict=True))
            ],
        )
        weights = dict(zip(names, best.tolist(), strict=True))
        return Outcome(weights, notes=notes, findings=[law_finding(fit)], tables=[table])

    def _prior(self, problem: LLMReweighting) -> NDArray[np.float64]:
        tables = problem.source_tables
        prior = named_distribution(self.prior, list(tables), list(map(len, tables.values())), "baseline.prior")
        found: NDArray[np.float64] = prior.numpy()
        return found

    def _bounds(self, problem: LLMReweighting) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        names = list(problem.source_tables)
        most: Mapping[str, float] = self.at_most if isinstance(self.at_most, dict) else dict.fromkeys(names, self.at_most)
        if unknown := sorted(set(most) - set(names)):
            raise InputError(f"baseline.at_most: {unknown[0]!r} is not a source; the sources are {', '.join(names)}")
        return np.full(len(names), self.floor), np.array([min(1.0, most.get(name, 1.0)) for name in names])

    def _runs(self, task: Task) -> int:
        return 4 * len(task.problem.source_tables) + 8 if self.runs is None else self.runs

    def _length(self, task: Task) -> int:
        return min(task.run.limit, STEPS) if self.steps is None else self.steps

    def _training(self, solver: Callable[[], Solver[Any] | None] = lambda: None) -> LowerTraining:
        return chosen_training("swarm", self.lr, self.optimizer, solver)


def validation_losses(problem: LLMReweighting, losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """The validation loss of every run, from those of rows. Shape: (runs, rows) -> (runs,)."""
    tables, of_set = problem.validation_tables, set_shares(problem)
    of_row = np.concatenate([np.full(len(table), of_set[name] / len(table)) for name, table in tables.items()])
    mean: NDArray[np.float64] = losses @ of_row
    return mean


def law_finding(fit: Fit) -> Finding:
    """How well the law predicts runs that it has not seen. Flagged if it is not good enough to choose a mix by."""
    numbers = f"R² = {fit.r2:.2f}, rank correlation {fit.rank_correlation:.2f}"
    if fit.r2 >= ENOUGH:
        words = f"the law predicts the validation losses of runs that it was not fitted to ({numbers})"
        return Finding("law-fit", False, words)
    words = (
        f"the law does not predict the validation losses of runs that it was not fitted to ({numbers}, leaving out one run "
        f"at a time; R² should be {ENOUGH} or more): do not use these weights; raise baseline.runs, baseline.steps or "
        "baseline.lr"
    )
    return Finding("law-fit", True, words)


def _mean_run(history: Sequence[Record], length: int) -> list[Record]:
    """The training losses of the sources at each step of a run, as means over the runs that saw the source there."""
    steps = []
    for own in range(length):
        seen: dict[str, list[float]] = {}
        for record in history[own::length]:
            for name, loss in record.named("lower_parts").items():
                seen.setdefault(name, []).append(loss)
        means = {name: float(np.mean(losses)) for name, losses in seen.items()}
        steps.append(Record(own, 0.0, {}, parts={"lower_parts": means}))
    return steps
