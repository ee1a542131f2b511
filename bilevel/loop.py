"""The loop: activate, step, record, checkpoint, resume."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, TypeVar, cast

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

T = TypeVar("T")


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

    Every process of a launcher calls this alike. The first one writes files and tells the observer; what it finds wrong
    ends all of them with the same error.

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
    if output is None and resume:
        raise InputError("resume needs the output directory of the run to go on with")
    directory = RunDirectory(Path(output)) if output is not None else None
    run = Run(problem, solver, backend, active, steps, seed, directory.path if directory else None, recipe)
    backend.start(seed)
    try:
        first = backend.shard.rank == 0
        if directory is not None:
            on_first(backend, lambda: directory.check_same(recipe) if resume else directory.check_free())
        _require_same(backend, "recipe", recipe)
        on_first(backend, problem.prepare)  # it may fill a cache, which the others then find
        _together(backend, lambda: None if first else problem.prepare())
        _require_same(backend, "data", problem.fingerprint())
        _check_batches(problem, backend)
        keeper = _Keeper(directory, run, checkpoint_every, keep_checkpoints) if directory else None
        state = solver.init(problem, backend)
        if keeper is not None:
            keeper.open(state)
        _loop(run, state, keeper, observer if first else None)
        return Result(backend.weights(state.x), run.history)
    finally:
        backend.close()


def on_first(backend: Backend, act: Callable[[], T]) -> T:
    """Do something in the first process; all get what it returns, or the error that it raises."""
    return cast(T, _together(backend, lambda: act() if backend.shard.rank == 0 else None)[0])


def _together(backend: Backend, act: Callable[[], T]) -> list[T]:
    """Do something in every process; all get what everybody got, or the error of the first one that fails."""
    outcome: tuple[T | None, Exception | None] = (None, None)
    try:
        outcome = (act(), None)
    except Exception as error:
        outcome = (None, error)
    outcomes = backend.gather(outcome)
    for _, failure in outcomes:
        if failure is not None:
            raise failure
    return [cast(T, value) for value, _ in outcomes]


def _require_same(backend: Backend, what: str, value: Any) -> None:
    """Raise `InputError` if the processes do not agree, which would train nonsense or wait forever."""
    digests = backend.gather(hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest())
    other = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if other:
        raise InputError(
            f"process {other[0]} has another {what} than process 0; every process must be started with the same recipe "
            "and see the same files"
        )


def _check_batches(problem: Problem[Any], backend: Backend) -> None:
    """Draw the first batches before a large module is built: what is wrong with them is then known at once.

    Raises `InputError` if processes would do different numbers of forward passes: one would wait for the others forever.
    """
    for draw in (problem.upper_batch, problem.lower_batch):
        counts = _together(backend, lambda draw=draw: len(draw(0, backend.shard)))  # type: ignore[misc]
        if len(set(counts)) > 1:
            raise InputError(
                f"the processes get different numbers of micro-batches ({counts}); "
                "choose a batch size that is a multiple of the number of processes"
            )


def _loop(run: Run, state: State, keeper: _Keeper | None, observer: Observer | None) -> None:
    error: BaseException | None = None
    alone = run.backend.shard.world_size == 1
    with _stop_signals(impatient=alone) as stop:
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
                if any(run.backend.gather(stop.asked)) and t + 1 < run.steps:  # a launcher's signal reaches some sooner
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
        "size": sum(run.backend.gather(run.backend.processed - processed)),
        "seconds": round(time.perf_counter() - started, 4),
    }


class _Keeper:
    """Writes a run's directory: records, artifacts and checkpoints. The first process writes; all save their parts."""

    def __init__(self, directory: RunDirectory, run: Run, every: int | None, keep: int) -> None:
        self.directory = directory
        self.run = run
        self.every = every
        self.keep = keep
        self.first = run.backend.shard.rank == 0
        self.written = 0.0  # when the artifacts were last written

    def open(self, state: State) -> None:
        """Create the directory, or bring variables and history to where its last checkpoint was."""
        self._check_disk(state)
        on_first(self.run.backend, lambda: self.directory.create(self.run.recipe))
        found = on_first(self.run.backend, self._find)
        if found is None:
            return
        self.run.start, where, state.memory, self.run.history = found
        self.run.backend.load(where, state.variables)
        # the steps after the checkpoint are about to be done again
        on_first(self.run.backend, lambda: self.directory.write_history(self.run.history))

    def _find(self) -> tuple[int, Path, dict[str, Any], list[Record]] | None:
        """(steps done, where, solver's memory, records) of the last checkpoint; None for a new run."""
        checkpoint = self.directory.last_checkpoint()
        if checkpoint is None:
            self.directory.write_history([])
            return None
        steps, where = checkpoint
        if steps > self.run.steps:
            raise InputError(f"{where} has done {steps} steps already, run.steps is {self.run.steps}")
        try:
            kept = json.loads((where / "run.json").read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"the checkpoint {where} cannot be read: {error}") from error
        if kept["fingerprint"] != self.run.problem.fingerprint():
            raise InputError(
                f"{where} was made with other data or another model: their content has changed since; "
                "bring it back, or start anew in another --output"
            )
        return steps, where, kept["memory"], self.directory.read_history(steps)

    def after_step(self, state: State) -> None:
        """Record the last step; a checkpoint where it is due."""
        if self.first:
            self.directory.append(self.run.history[-1])
        done = len(self.run.history)
        if self.every and done % self.every == 0 and done < self.run.steps:
            self.checkpoint(state)
        elif time.monotonic() - self.written > 1.0:
            self.write_artifacts()

    def checkpoint(self, state: State) -> None:
        """Save all that is not a function of the step."""
        backend, done = self.run.backend, len(self.run.history)
        part = on_first(backend, lambda: self.directory.begin_checkpoint(done))
        backend.save(part, state.variables)
        backend.gather(None)  # all have written
        kept = {"memory": state.memory, "fingerprint": self.run.problem.fingerprint()}
        if self.first:
            write_atomic(part / "run.json", json.dumps(kept))
        on_first(backend, lambda: self.directory.finish_checkpoint(part, self.keep))
        x = backend.weights(state.x)
        if self.first:
            self.directory.write(self.run.problem.snapshot(x))
        self.write_artifacts()

    def write_artifacts(self) -> None:
        """Let the problem's files say what the history says."""
        if self.run.history and self.first:
            facts = {"seed": self.run.seed, "versions": {name: version(name) for name in ("bilevel", "torch")}}
            self.directory.write(self.run.problem.artifacts(self.run.history, facts))
        self.written = time.monotonic()

    def _check_disk(self, state: State) -> None:
        """Refuse to begin what cannot be saved."""
        blocks = self.run.active.at(self.run.start, next(iter(state.replicas.values())).blocks, self.run.seed)
        for replica in state.replicas.values():
            self.run.backend.activate(replica, blocks)
        needed = (self.keep + 1) * self.run.backend.checkpoint_bytes(state.variables)
        on_first(self.run.backend, lambda: self._require_free(needed))

    def _require_free(self, needed: int) -> None:
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
def _stop_signals(*, impatient: bool) -> Iterator[_Stop]:
    """Ctrl-C and SIGTERM ask the run to stop after the step.

    impatient: a second one stops at once. Not under a launcher, which passes on what its processes got already.
    """
    stop = _Stop()

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.asked and impatient:
            raise KeyboardInterrupt
        if not stop.asked:
            print("\nstopping after this step" + " (again to stop at once)" * impatient, file=sys.stderr)
        stop.asked = True

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
