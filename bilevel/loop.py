"""The loop: activate, step, record, checkpoint, resume."""

from __future__ import annotations

import json
import math
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor

from bilevel.active import Active, All
from bilevel.backend import Backend
from bilevel.errors import InputError, NonFiniteError, RunError
from bilevel.files import write_atomic
from bilevel.plain import name_of, to_plain
from bilevel.problem import Problem, Record
from bilevel.run_directory import RunDirectory
from bilevel.solver import Solver, State


@dataclass
class Run:
    """A run as plugins see it: its parts, and what has happened so far.

    start: steps that were done before, by the run that this one resumes.
    history: one record a step, from step 0.
    output: the run directory; None if nothing is written.
    """

    problem: Problem[Any]
    solver: Solver[Any]
    backend: Backend
    active: Active
    steps: int
    seed: int
    output: Path | None
    recipe: Mapping[str, Any]
    start: int = 0
    history: list[Record] = field(default_factory=list)


@dataclass(frozen=True)
class Result:
    """What a run learned.

    x: the upper variable's parameters, by name.
    history: one record a step.
    """

    x: Mapping[str, Tensor]
    history: Sequence[Record]


class Observer(Protocol):
    """Follows a run; see the hooks of the same names."""

    def bilevel_run_start(self, *, run: Run) -> Any:
        """The run begins."""

    def bilevel_step_end(self, *, run: Run, record: Record) -> Any:
        """A step is done."""

    def bilevel_run_end(self, *, run: Run, error: BaseException | None) -> Any:
        """The run is over."""


class Interrupted(RunError):
    """The run was asked to stop (Ctrl-C, SIGTERM), and did so after a whole step, with a checkpoint."""


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

    steps: in all, the ones done before a resume included.
    seed: of everything random. The same seed gives the same run, on the same device bit for bit.
    active: which blocks of the lower variable train at a step; all of them by default.
    output: directory for the recipe, metrics, checkpoints and the problem's artifacts; must be new or empty, or, with
        `resume`, hold a run of the same recipe. None: nothing is written.
    checkpoint_every: steps between checkpoints. None: one at the end, and one when interrupted.
    keep_checkpoints: older ones of this run are removed.
    resume: go on from the last checkpoint in `output`, exactly as if the run had never stopped.
    recipe: what to keep as recipe.yaml; by default the fields of the parts.
    observer: told of the start, every step and the end.

    Raises `InputError` for what the user has to mend, `NonFiniteError` (naming step and variable) when numbers blow up,
    `Interrupted` when asked to stop; the run directory then holds the last good state.
    """
    if steps < 1:
        raise InputError(f"run.steps must be at least 1, not {steps}")
    active = active or All()
    if recipe is None:
        recipe = _describe(problem=problem, solver=solver, backend=backend, active=active, run={"seed": seed})
    directory = RunDirectory(Path(output)) if output is not None else None
    if directory is not None and resume:
        directory.check_same(recipe)
    elif directory is not None:
        directory.check_free()
    elif resume:
        raise InputError("resume needs the output directory of the run to go on with")

    problem.prepare()
    run = Run(problem, solver, backend, active, steps, seed, directory.path if directory else None, recipe)
    keeper = _Keeper(directory, run, checkpoint_every, keep_checkpoints) if directory else None
    backend.start(seed)
    try:
        state = solver.init(problem, backend)
        if keeper is not None:
            keeper.open(state)
        _loop(run, state, keeper, observer)
        return Result(backend.weights(state.x), run.history)
    finally:
        backend.close()


def _loop(run: Run, state: State, keeper: _Keeper | None, observer: Observer | None) -> None:
    error: BaseException | None = None
    with _stop_signals() as stop:
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
                if stop.asked and t + 1 < run.steps:
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
    """One step: choose the blocks, let the solver move, say what happened."""
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
    return {
        "step": t,
        **metrics,
        "upper": upper,
        "active": sorted(blocks),
        "optimizer_bytes": sum(run.backend.optimizer_bytes(variable) for variable in state.variables),
        "size": run.backend.processed - processed,
        "seconds": round(time.perf_counter() - started, 4),
    }


class _Keeper:
    """Writes a run's directory: records, artifacts and checkpoints."""

    def __init__(self, directory: RunDirectory, run: Run, every: int | None, keep: int) -> None:
        self.directory = directory
        self.run = run
        self.every = every
        self.keep = keep
        self.written = 0.0  # when the artifacts were last written

    def open(self, state: State) -> None:
        """Create the directory, or bring variables and history to where its last checkpoint was."""
        checkpoint = self.directory.last_checkpoint()
        self._check_disk(state)
        self.directory.create(self.run.recipe)
        if checkpoint is None:
            self.directory.write_history([])
            return
        self.run.start, where = checkpoint
        if self.run.start > self.run.steps:
            raise InputError(f"{where} has done {self.run.start} steps already, run.steps is {self.run.steps}")
        self.run.backend.load(where, state.variables)
        state.memory = json.loads((where / "memory.json").read_text())
        self.run.history = self.directory.read_history(self.run.start)
        self.directory.write_history(self.run.history)  # the steps after the checkpoint are about to be done again

    def after_step(self, state: State) -> None:
        """Record the last step; a checkpoint where it is due."""
        self.directory.append(self.run.history[-1])
        done = len(self.run.history)
        if self.every and done % self.every == 0 and done < self.run.steps:
            self.checkpoint(state)
        elif time.monotonic() - self.written > 1.0:
            self.write_artifacts()

    def checkpoint(self, state: State) -> None:
        """Save all that is not a function of the step."""
        part = self.directory.begin_checkpoint(len(self.run.history))
        self.run.backend.save(part, state.variables)
        write_atomic(part / "memory.json", json.dumps(state.memory))
        self.directory.finish_checkpoint(part, self.keep)
        self.directory.write(self.run.problem.snapshot(self.run.backend.weights(state.x)))
        self.write_artifacts()

    def write_artifacts(self) -> None:
        """Let the problem's files say what the history says."""
        if self.run.history:
            facts = {"seed": self.run.seed, "versions": {name: version(name) for name in ("bilevel", "torch")}}
            self.directory.write(self.run.problem.artifacts(self.run.history, facts))
        self.written = time.monotonic()

    def _check_disk(self, state: State) -> None:
        """Refuse to begin what cannot be saved."""
        blocks = self.run.active.at(self.run.start, next(iter(state.replicas.values())).blocks, self.run.seed)
        for replica in state.replicas.values():
            self.run.backend.activate(replica, blocks)
        needed = (self.keep + 1) * self.run.backend.checkpoint_bytes(state.variables)
        parent = self.directory.path
        while not parent.exists():
            parent = parent.parent
        free = shutil.disk_usage(parent).free
        if free < needed:
            raise InputError(
                f"not enough disk for checkpoints: {self.directory.path} has {free / 1e9:.1f} GB free, and "
                f"{self.keep + 1} checkpoints need {needed / 1e9:.1f} GB; free some, choose another --output, "
                "or lower run.keep_checkpoints"
            )


@dataclass
class _Stop:
    asked: bool = False


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """Ctrl-C and SIGTERM ask the run to stop after the step; a second one stops at once."""
    stop = _Stop()

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True
        print("\nstopping after this step (again to stop at once)", file=sys.stderr)

    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may set handlers
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _how_to_go_on(done: int, run: Run) -> str:
    if run.output is None:
        return f"stopped after {done} of {run.steps} steps; nothing was saved, as the run has no output directory"
    return f"stopped after {done} of {run.steps} steps; a checkpoint is in {run.output}; go on with --resume"


def _describe(**parts: Any) -> dict[str, Any]:
    """A recipe of objects that were made in Python: their class and fields."""
    return {
        name: to_plain(part) if isinstance(part, Mapping) else {"class": name_of(part), "fields": to_plain(part)}
        for name, part in parts.items()
    }
