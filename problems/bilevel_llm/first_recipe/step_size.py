"""A line search for the step size: a few steps of training from the model as it is, by each of several step sizes.

All of them see the same rows, blocks and start, and so does the model when it does not move at all. A step size is judged by
the difference to that, since the noise of the batches, which is often larger than what a few steps achieve, is in both.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bilevel import AdamW, Backend, Metrics, NonFiniteError, Problem, Record, Run, Solver, State
from bilevel.active import Active
from bilevel.blocks import Blocks
from bilevel.loop import fit
from bilevel.optimizer import Optimizer
from bilevel.solvers.shared import lower_step, place
from bilevel.terminal import NotebookLine

log = logging.getLogger("bilevel.init")

TRIED = (3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
STEPS = 6
"""Of each trial. AdamW has reached its own pace by then, and too large a step size has done its damage."""
UNCHANGED = 1e-3
"""Of the loss: what falls by less does not move."""


@dataclass(frozen=True)
class Trial:
    """A step size, and by which share of the loss of the unmoved model the loss has fallen at the end of its steps.

    fall: NaN if a loss or a gradient was not finite.
    """

    lr: float
    fall: float


@dataclass(frozen=True)
class StepSize:
    """What was tried, from the smallest step size on."""

    trials: Sequence[Trial]

    @property
    def lr(self) -> float:
        """The one below that with the largest fall: what is best for a few steps is too large for many."""
        falls = [trial.fall if np.isfinite(trial.fall) else -np.inf for trial in self.trials]
        return self.trials[max(0, int(np.argmax(falls)) - 1)].lr

    @property
    def falls(self) -> bool:
        """Whether the loss falls by any of them."""
        return any(trial.fall > UNCHANGED for trial in self.trials)

    def in_words(self) -> str:
        """What was tried."""
        return ", ".join(
            f"{trial.lr:g}: {f'{-trial.fall:+.1%}' if np.isfinite(trial.fall) else 'not finite'}" for trial in self.trials
        )


def find_step_size(problem: Problem[Any], backend: Backend, active: Active, optimizer: Optimizer, seed: int) -> StepSize:
    """Try step sizes from the smallest on, until the loss falls by less again. Nothing is written."""
    solver = _Trials((0.0, *TRIED), optimizer)
    with NotebookLine() as line, suppress(_Enough, NonFiniteError):
        watch = _Watch(line)
        steps = STEPS * len(solver.lrs)
        fit(problem, solver, backend, steps=steps, seed=seed, active=_EachAlike(active), observer=watch)
    return StepSize(watch.trials())


class _Enough(Exception):
    """Larger step sizes would only be worse."""


@dataclass
class _Watch:
    """Collects the losses, and ends the search."""

    line: NotebookLine
    losses: list[float] = field(default_factory=list)

    def bilevel_run_start(self, *, run: Run) -> None:
        """Nothing is to be done."""

    def bilevel_step_end(self, *, run: Run, record: Record) -> None:
        """Keep the loss; stop where the last trial was clearly worse than the best one."""
        self.losses.append(record.metrics["lower_loss"])
        trial = (len(self.losses) - 1) // STEPS
        self.line.say(
            f"looking for a step size: {f'trying {TRIED[trial - 1]:g}' if trial else 'how the loss varies by itself'}"
        )
        if len(self.losses) % STEPS == 0:
            trials = self.trials()
            if trials:
                log.info("step size %g: the loss changes by %+.1f%%", trials[-1].lr, -100 * trials[-1].fall)
            if trials and trials[-1].fall < max(trial.fall for trial in trials) / 2 and StepSize(trials).falls:
                raise _Enough

    def bilevel_run_end(self, *, run: Run, error: BaseException | None) -> None:
        """Nothing is to be done."""

    def trials(self) -> list[Trial]:
        """The trials so far; the loss of one that is not whole is not finite, as its run has ended by that."""
        still, *moved = (self.losses[start : start + STEPS] for start in range(0, len(self.losses), STEPS))
        late = slice(STEPS // 2, None)
        falls = [
            1 - float(np.mean(losses[late]) / np.mean(still[late])) if len(losses) == STEPS else float("nan")
            for losses in moved
        ]
        return [Trial(lr, fall) for lr, fall in zip(TRIED, falls, strict=False)]


@dataclass(frozen=True)
class _Trials(Solver[State]):
    """Training of the lower variable, again and again from the same start, each time by another step size."""

    lrs: tuple[float, ...] = ()
    optimizer: Optimizer = field(default_factory=AdamW)

    def init(self, problem: Problem[Any], backend: Backend) -> State:
        """Place x and z; what z is now is where every trial starts."""
        state = place(problem, backend, ("z",), AdamW(), self.optimizer)
        backend.mark(state.replicas["z"])
        return state

    def step(self, t: int, state: State, problem: Problem[Any], backend: Backend) -> Metrics:
        """One step of z."""
        trial, k = divmod(t, STEPS)
        if k == 0:
            backend.rewind(state.replicas["z"])
        loss = lower_step(problem, backend, state.x, state.replicas["z"], k, lr=self.lrs[trial])
        return {"held": 1.0, "lower_loss": loss.value}


@dataclass(frozen=True)
class _EachAlike(Active):
    """The draws of another rule, the same ones for every trial."""

    rule: Active

    def at(self, t: int, blocks: Blocks, seed: int) -> frozenset[str]:
        """The blocks of the step within its trial."""
        return self.rule.at(t % STEPS, blocks, seed)
