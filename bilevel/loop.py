"""The loop: activate, step, record, checkpoint, resume."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bilevel.active import Active, All
from bilevel.agreement import check_batches, on_first, require_same, together
from bilevel.backend import Backend
from bilevel.errors import InputError, NonFiniteError, RunError
from bilevel.keeper import Keeper
from bilevel.plain import name_of, to_plain
from bilevel.problem import Problem
from bilevel.record import Record
from bilevel.run import Run
from bilevel.run_directory import RunDirectory
from bilevel.signals import stop_signals
from bilevel.solver import Solver, State


@dataclass(frozen=True)
class Result:
    """What a run learned.

    x: the upper variable's parameters, by name.
    history: one record per step.
    """

    x: Mapping[str, Tensor]
    history: Sequence[Record]


class Observer(Protocol):
    """Is told what happens in a run; see the hooks of the same names."""

    def bilevel_run_start(self, *, run: Run) -> Any:
        """Called when the run begins."""

    def bilevel_step_end(self, *, run: Run, record: Record) -> Any:
        """Called after every step."""

    def bilevel_run_end(self, *, run: Run, error: BaseException | None) -> Any:
        """Called when the run is over."""


class Interrupted(RunError):
    """The run was asked to stop (Ctrl-C, SIGTERM), and did so after completing a step and saving a checkpoint."""


def fit(
    problem: Problem[Any],
    solver: Solver[Any],
    backend: Backend,
    *,
    steps: int,
    seed: int = 0,
    active: Active | None = None,
    output: str | Path | None = None,
    checkpoint_every: int | None = None,
    keep_checkpoints: int = 2,
    resume: bool = False,
    recipe: Mapping[str, Any] | None = None,
    observer: Observer | None = None,
) -> Result:
    """Solve min_x f(x, y*(x)).

    Every process of a launcher makes this same call. The first one writes files and tells the observer; an error that it
    finds ends all of them with the same message.

    steps: the total number, including those done before a resume.
    seed: the seed of everything random. The same seed gives the same run, on the same device bit for bit.
    active: which blocks of the lower variable train at a step; all of them by default.
    output: directory for the recipe, metrics, checkpoints and the problem's artifacts; must be new or empty, or, with
        `resume`, hold a run of the same recipe. None: nothing is written.
    checkpoint_every: steps between checkpoints. None: one at the end, and one when interrupted.
    keep_checkpoints: how many to keep; older ones of this run are removed.
    resume: continue from the last checkpoint in `output`, exactly as if the run had never stopped.
    recipe: what to keep as recipe.yaml; by default the fields of the parts.
    observer: is told of the start, every step and the end.

    Raises `InputError` for what the user has to fix, `NonFiniteError` (naming step and variable) when numbers blow up,
    `Interrupted` when asked to stop; the run directory then holds the last good state.
    """
    if steps < 1:
        raise InputError(f"run.steps must be at least 1, not {steps}")
    active = active or All()
    if recipe is None:
        recipe = _describe(problem=problem, solver=solver, backend=backend, active=active, run={"seed": seed})
    if output is None and resume:
        raise InputError("resume needs the output directory of the run to continue")
    directory = RunDirectory(Path(output)) if output is not None else None
    run = Run(problem, solver, backend, active, steps, seed, directory.path if directory else None, recipe)
    backend.start(seed)
    try:
        first = backend.shard.rank == 0
        if directory is not None:
            on_first(backend, lambda: directory.check_same(recipe) if resume else directory.check_free())
        require_same(backend, "settings", recipe)
        on_first(backend, problem.prepare)  # it may fill a cache, which the other processes then find
        together(backend, lambda: None if first else problem.prepare())
        require_same(backend, "data", problem.fingerprint())
        check_batches(problem, backend)
        keeper = Keeper(directory, run, checkpoint_every, keep_checkpoints) if directory else None
        state = solver.init(problem, backend)
        if keeper is not None:
            keeper.open(state)
        _loop(run, state, keeper, observer if first else None)
        return Result(backend.weights(state.x), run.history)
    finally:
        backend.close()


def _loop(run: Run, state: State, keeper: Keeper | None, observer: Observer | None) -> None:
    error: BaseException | None = None
    alone = run.backend.shard.world_size == 1
    with stop_signals(impatient=alone) as stop:
        try:
            if observer is not None:
                observer.bilevel_run_start(run=run)
            for t in range(run.start, run.steps):
                record = _step(t, run, state)
                run.history.append(record)
                if keeper is not None:
                    keeper.after_step(state)
                if observer is not None:
                    observer.bilevel_step_end(run=run, record=record)
                if any(run.backend.gather(stop.asked)) and t + 1 < run.steps:  # a signal reaches some processes sooner
                    if keeper is not None:
                        keeper.checkpoint(state)
                    raise Interrupted(_how_to_go_on(t + 1, run))
            if keeper is not None:
                keeper.checkpoint(state)
        except BaseException as caught:
            error = caught
            raise
        finally:
            if keeper is not None:
                keeper.write_artifacts()
            if observer is not None:
                observer.bilevel_run_end(run=run, error=error)


def _step(t: int, run: Run, state: State) -> Record:
    """Do one step: choose the blocks, let the solver move the variables, and record what happened."""
    started, processed = time.perf_counter(), run.backend.processed
    blocks = run.active.at(t, next(iter(state.replicas.values())).blocks, run.seed)
    for replica in state.replicas.values():
        run.backend.activate(replica, blocks)
    try:
        metrics = run.solver.step(t, state, run.problem, run.backend)
        with torch.no_grad():
            upper = {key: float(value) for key, value in run.problem.summary(state.x).items()}
        for key, value in upper.items():
            if not math.isfinite(value):
                raise NonFiniteError(f"{key} of the upper variable is {value}")
    except NonFiniteError as error:
        raise NonFiniteError(f"step {t}: {error}; lower the step sizes, or clip the gradient") from error
    size = sum(run.backend.gather(run.backend.processed - processed))
    return Record.of_step(
        t,
        metrics,
        upper=upper,
        active=sorted(blocks),
        optimizer_bytes=sum(run.backend.optimizer_bytes(variable) for variable in state.variables),
        size=size,
        seconds=round(time.perf_counter() - started, 4),
    )


def _how_to_go_on(done: int, run: Run) -> str:
    if run.output is None:
        return f"stopped after {done} of {run.steps} steps; nothing was saved, as the run has no output directory"
    return f"stopped after {done} of {run.steps} steps; a checkpoint is in {run.output}; continue with --resume"


def _describe(**parts: Any) -> dict[str, Any]:
    """The recipe of objects that were made in Python: their classes and fields."""
    return {
        name: to_plain(part) if isinstance(part, Mapping) else {"class": name_of(part), "fields": to_plain(part)}
        for name, part in parts.items()
    }
