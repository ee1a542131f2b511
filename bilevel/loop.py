"""The loop: activate, step, record, checkpoint, resume."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bilevel.active import Active, All
from bilevel.agreement import check_batches, first_then_others, on_first, require_same
from bilevel.answer import command_line, resume_words
from bilevel.backend import Backend
from bilevel.checkpoint_writer import CheckpointWriter
from bilevel.divergence import Sizes
from bilevel.errors import InputError, NonFiniteError, RunError
from bilevel.keeper import Keeper
from bilevel.lock import Lock
from bilevel.logger import Logger
from bilevel.micro_batch import choose_micro_batch
from bilevel.observer import Followers, Observer, check_loggers
from bilevel.plain import name_of, to_plain
from bilevel.problem import Problem
from bilevel.record import Record
from bilevel.run import Run
from bilevel.run_directory import RunDirectory
from bilevel.signals import stop_signals
from bilevel.solver import Solver, State, begin
from bilevel.standstill import Standstill
from bilevel.warm_start import begin_from

log = logging.getLogger("bilevel")
_ENVIRONMENT = {"python": sys.version_info[:2], **{name: version(name) for name in ("bilevel", "torch")}}


@dataclass(frozen=True)
class Result:
    """What a run learned.

    x: the upper variable's parameters, by name.
    history: one record a step.
    """

    x: Mapping[str, Tensor]
    history: Sequence[Record]


class Interrupted(RunError):
    """The run was asked to stop (Ctrl-C, SIGTERM), and did so after a whole step, with a checkpoint."""


def fit(
    problem: Problem[Any],
    solver: Solver[Any],
    backend: Backend,
    *,
    steps: int,
    until_usable: bool = False,
    seed: int = 0,
    active: Active | None = None,
    output: str | Path | None = None,
    checkpoint_every: int | None = None,
    keep_checkpoints: int = 2,
    checkpoint_in_background: bool = True,
    resume: bool = False,
    warm_start: str | Path | None = None,
    recipe: Mapping[str, Any] | None = None,
    observer: Observer | None = None,
    loggers: Sequence[Logger] = (),
) -> Result:
    """Solve min_x f(x, y*(x)).

    Every process of a launcher calls this alike. The first one writes files and tells the observer; what it finds wrong
    ends all of them with the same error.

    steps: the total number of steps, including those done before a resume.
    until_usable: end earlier, as soon as the problem's verdict is to use the result.
    seed: the seed of all random numbers. The same seed gives the same run, bit for bit on the same device.
    active: which blocks of the lower variable train at a step; all of them by default.
    output: directory for the recipe, metrics, checkpoints and the problem's artifacts; must be new or empty, or, with
        `resume`, hold a run of the same recipe. None: nothing is written.
    checkpoint_every: steps between checkpoints. None: one at the end, and one when interrupted.
    keep_checkpoints: the number of checkpoints to keep; older ones of this run are removed.
    checkpoint_in_background: copy the state into the CPU's memory, and write it while the next steps are taken. The copy
        takes as much memory as a checkpoint has bytes, of which each process holds its part; where that is more than half of
        what is free, training waits, as it does with False. The last checkpoint is written without a copy.
    resume: continue from the last checkpoint in `output`, exactly as if the run had never stopped.
    warm_start: the directory of another run, from whose last state a new one begins, as far as its variables fit; see
        `bilevel.warm_start`. A run that is resumed has begun already.
    recipe: the content of recipe.yaml; by default the fields of the parts.
    observer: is called at the start, after every step and at the end.
    loggers: follow the run as the observer does, each in a thread of its own, and never fail it; see `bilevel.Logger`.

    Only one process at a time, or job of several, may work in a directory; see `bilevel.lock`.

    Raises `InputError` for what the user has to correct, `OSError` if a file cannot be written, `NonFiniteError` (naming
    step and variable) when numbers blow up, `Interrupted` when asked to stop. The run directory then holds the last good
    state.
    """
    if steps < 1:
        raise InputError(f"run.steps must be at least 1, not {steps}")
    active = active or All()
    if recipe is None:
        recipe = _describe(problem=problem, solver=solver, backend=backend, active=active, run={"seed": seed})
    if output is None and resume:
        raise InputError("resume needs the output directory of the run to resume")
    directory = RunDirectory(Path(output)) if output is not None else None
    run = Run(problem, solver, backend, active, steps, seed, directory.path if directory else None, recipe)
    lock: Lock | None = None
    backend.start(seed)
    leaving = ExitStack()
    try:
        first = backend.shard.rank == 0
        on_first(backend, lambda: check_loggers(loggers))
        if directory is not None:
            lock = _take(directory, backend, leaving, lambda d: d.check_same(recipe) if resume else d.check_free())
            leaving.callback(directory.close)
        require_same(backend, "recipe", recipe)
        require_same(backend, "environment", _ENVIRONMENT)
        first_then_others(backend, problem.prepare)
        require_same(backend, "data", problem.fingerprint())
        micro_batch = choose_micro_batch(run, directory, resume=resume)
        check_batches(problem, backend)
        keeper: Keeper | None = None
        if directory is not None:
            copies = checkpoint_in_background and checkpoint_every is not None
            writer = CheckpointWriter(backend, directory, keep_checkpoints, copies, lock)
            keeper = Keeper(directory, run, checkpoint_every, writer, lock)
        state = begin(solver, problem, backend)
        if warm_start is not None and not (resume and directory is not None and on_first(backend, directory.saved)):
            begin_from(Path(warm_start), run, state)
        problem.examine(partial(backend.measure, next(iter(state.replicas.values()))))
        if keeper is not None:
            keeper.open(state)
        if directory is not None and micro_batch is not None:
            on_first(backend, lambda: directory.write({directory.micro_batch_file.name: micro_batch.to_json()}))
        _loop(run, state, keeper, Followers(observer, loggers) if first else None, until_usable)
        return Result(backend.weights(state.x), run.history)
    finally:
        leaving.close()
        backend.close()


def _take(
    directory: RunDirectory, backend: Backend, leaving: ExitStack, check: Callable[[RunDirectory], None]
) -> Lock | None:
    """Lock the directory, in the first process. It is checked before, when nothing is written yet, and while it is held."""

    held: list[Lock] = []

    def take() -> None:
        check(directory)
        held.append(leaving.enter_context(directory.owned()))
        check(directory)

    on_first(backend, take)
    return held[0] if held else None


def _loop(run: Run, state: State, keeper: Keeper | None, observer: Observer | None, until_usable: bool) -> None:
    error: BaseException | None = None
    alone, first = run.backend.shard.world_size == 1, run.backend.shard.rank == 0
    with stop_signals(impatient=alone) as stop:
        try:
            if observer is not None:
                observer.bilevel_run_start(run=run)
            moves = sum(record.moved for record in run.history)
            state.activate(run.active, run.start, run.seed, run.backend)
            sizes, standstill = Sizes(run.solver, run.backend, state), Standstill(run, state)
            for t in range(run.start, run.steps):
                if until_usable and _asks(run, moves) and on_first(run.backend, lambda: _usable(run)):
                    break
                record = _step(t, run, state, sizes)
                run.history.append(record)
                moves += record.moved
                standstill.after(t + 1)
                if keeper is not None:
                    keeper.after_step(state, record)
                if observer is not None:
                    observer.bilevel_step_end(run=run, record=record)
                told = run.backend.all_gather((stop.asked, keeper.writer.outcome if keeper is not None else None))
                if keeper is not None:
                    keeper.writer.settle([outcome for _, outcome in told])
                if any(asked for asked, _ in told) and t + 1 < run.steps:  # a launcher's signal reaches some sooner
                    if keeper is not None:
                        keeper.checkpoint(state, last=True)
                    raise Interrupted(_how_to_go_on(t + 1, run))
            if keeper is not None:
                keeper.checkpoint(state, last=True)
            if first and (sentence := standstill.sentence()) is not None:
                log.warning(sentence)
        except BaseException as caught:
            error = caught
            if keeper is not None:
                keeper.writer.leave(error)
            raise
        finally:
            try:
                if keeper is not None:
                    _write_last(keeper, error)
            except Exception as failed:
                error = failed
                raise
            finally:
                if observer is not None:
                    observer.bilevel_run_end(run=run, error=error)


def _write_last(keeper: Keeper, error: BaseException | None) -> None:
    """Bring the artifacts up to date. If that fails after another error, this other one is what must be told."""
    try:
        keeper.write_artifacts()
    except Exception as failed:
        if error is None:
            raise
        log.warning("the files of the run are not up to date: %s", failed)


def _step(t: int, run: Run, state: State, sizes: Sizes) -> Record:
    """Do one step: activate the blocks, let the solver move, and record what happened."""
    started, processed = time.perf_counter(), run.backend.processed
    blocks = state.activate(run.active, t, run.seed, run.backend)
    try:
        metrics = run.solver.step(t, state, run.problem, run.backend)
        with torch.no_grad():
            upper = {key: float(value) for key, value in run.problem.summary(state.x).items()}
        for key, value in upper.items():
            if not math.isfinite(value):
                raise NonFiniteError(f"{key} of the upper variable is {value}", variable="x")
    except NonFiniteError as error:
        said = sizes.explain(error, t, state)
        raise NonFiniteError(said, variable=error.variable, moved=error.moved) from error
    return Record.of_step(
        t,
        metrics,
        upper=upper,
        active=sorted(blocks),
        optimizer_bytes=sum(run.backend.optimizer_bytes(variable) for variable in state.variables),
        size=run.backend.processed - processed,
        seconds=round(time.perf_counter() - started, 4),
    )


def _asks(run: Run, moves: int) -> bool:
    """Whether the verdict is due: the last step moved x, which has been moved so many times.

    From 128 moves on it is asked for less and less often, at every second, fourth, ... one, as it reads the whole
    history: a step would take longer the longer the run is.
    """
    return bool(run.history) and run.history[-1].moved and moves % (1 << max(0, moves.bit_length() - 7)) == 0


def _usable(run: Run) -> bool:
    """Whether the problem says to use the result."""
    verdict = run.problem.verdict(run.history)
    return verdict is not None and verdict.decision == "use"


def _how_to_go_on(done: int, run: Run) -> str:
    if run.output is None:
        return f"stopped after {done} of {run.steps} steps; nothing was saved, as the run has no output directory"
    command = command_line(resume_words(run), run.output)
    how = f"by `{command}`" if command else "with --resume (in Python: resume=True)"
    return f"stopped after {done} of {run.steps} steps; a checkpoint is in {run.output}; continue {how}"


def _describe(**parts: Any) -> dict[str, Any]:
    """Describe objects that were made in Python as a recipe: by their classes and fields."""
    return {
        name: to_plain(part) if isinstance(part, Mapping) else {"class": name_of(part), "fields": to_plain(part)}
        for name, part in parts.items()
    }
