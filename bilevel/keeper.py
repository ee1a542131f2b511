"""What a run keeps on disk: records, the problem's files, and checkpoints from which it can be resumed."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from bilevel import checkpoint
from bilevel.account import FILE
from bilevel.agreement import on_first, together
from bilevel.answer import account_of
from bilevel.checkpoint_writer import CheckpointWriter
from bilevel.documents import read_json
from bilevel.errors import DamagedError, InputError
from bilevel.history import History
from bilevel.lock import Lock
from bilevel.plain import to_plain
from bilevel.record import Record
from bilevel.run import Run
from bilevel.run_directory import RunDirectory
from bilevel.solver import State

log = logging.getLogger("bilevel")

SHARE = 0.01  # of a run's time that may go into bringing artifacts up to date, which takes longer the longer the run is


@dataclass(frozen=True)
class Kept:
    """The file run.json of a checkpoint: what is neither a variable nor a function of the step.

    steps: the steps that were done.
    memory: the solver's.
    fingerprint: that of the problem's data and model.
    history: the hash of the lines of these steps in metrics.jsonl.
    """

    steps: int
    fingerprint: Any
    history: str
    memory: dict[str, Any] = field(default_factory=dict)

    __pydantic_config__: ClassVar[Mapping[str, Any]] = {"extra": "forbid"}


@dataclass(frozen=True)
class Found:
    """A checkpoint that can be resumed from, with the records up to it, and the newer ones that are damaged."""

    where: Path
    kept: Kept
    history: Sequence[Record]
    lines: bytes
    damaged: Sequence[int]


class Keeper:
    """Writes a run's directory: records, artifacts and checkpoints. The first process writes; all save their shards.

    every: the steps between checkpoints; None: there is one at the end.
    lock: that of the directory, in the first process.
    """

    def __init__(
        self, directory: RunDirectory, run: Run, every: int | None, writer: CheckpointWriter, lock: Lock | None
    ) -> None:
        self.directory = directory
        self.run = run
        self.every = every
        self.writer = writer
        self.lock = lock
        self.first = run.backend.shard.rank == 0
        self._checked: set[str] = set()  # the keys of the solver's memory that were looked at
        self._due = 0.0  # when the artifacts are written next
        self._digest = hashlib.sha256()  # of metrics.jsonl

    def open(self, state: State) -> None:
        """Create the directory, or bring variables and history to where its last whole checkpoint was.

        Nothing is changed in a directory before everything has been found in order.
        """
        self._check_memory(state)
        state.activate(self.run.active, self.run.start, self.run.seed, self.run.backend)
        self.writer.require_room(self.run.backend.checkpoint_bytes(state.variables))
        found = self._find()
        if found is None:
            on_first(self.run.backend, lambda: self.directory.begin(self.run.recipe))
            return
        self.run.start, state.memory, self.run.history = found.kept.steps, found.kept.memory, History(found.history)
        self.run.backend.load(found.where, state.variables)
        self._digest.update(found.lines)
        on_first(self.run.backend, lambda: self._go_on(found))

    def _go_on(self, found: Found) -> None:
        self.directory.set_aside(found.damaged)
        self.directory.write_history(found.lines)  # the steps after the checkpoint will be done again
        self.directory.create(self.run.recipe)

    def _find(self) -> Found | None:
        """The newest checkpoint that is whole, said aloud if there is a newer one; None for a new run.

        Raises `InputError` if none is whole, and if it is one of another run.
        """
        reasons: dict[int, str] = {}
        backend = self.run.backend
        for steps, where in reversed(on_first(backend, lambda: self.directory.saved()).items()):
            shares = together(backend, lambda w=where: checkpoint.damage(w, backend.shard.rank, backend.shard.world_size))  # type: ignore[misc]
            reason = next(filter(None, shares), None)
            if reason is None:
                found = on_first(backend, lambda s=steps, w=where: self._read(s, w))  # type: ignore[misc]
                if not isinstance(found, str):
                    self._check(found[0])
                    for other in reasons.values():
                        log.warning("%s; going on from %s, the newest checkpoint that is whole", other, where)
                    return Found(where, *found, tuple(reasons))
                reason = found
            reasons[steps] = reason
        if reasons:
            newest = next(iter(reasons.values()))
            raise DamagedError(f"{newest}; no checkpoint in {self.directory.checkpoints} is whole, so start a new run")
        return None

    def _read(self, steps: int, where: Path) -> tuple[Kept, list[Record], bytes] | str:
        """What a checkpoint says beside its variables, or why it cannot be used."""
        try:
            kept = read_json(where / checkpoint.RUN, Kept)
            if kept.steps != steps:
                return f"{where} was written after {kept.steps} steps, and its name says {steps}"
            history, lines = self.directory.read_history(steps)
        except DamagedError as error:
            return str(error)
        if hashlib.sha256(lines).hexdigest() != kept.history:
            return f"{self.directory.metrics_file} is not as it was written: the hash of its first {steps} lines differs"
        return kept, history, lines

    def _check(self, kept: Kept) -> None:
        if kept.steps > self.run.steps:
            raise InputError(
                f"the run in {self.directory.path} has done {kept.steps} steps already, and run.steps is {self.run.steps}"
            )
        if kept.fingerprint != json.loads(json.dumps(self.run.problem.fingerprint())):
            raise InputError(
                f"the run in {self.directory.path} was made with different data or a different model: their content has "
                "changed since; restore it, or start a new run in another --output"
            )

    def after_step(self, state: State, record: Record) -> None:
        """Write the record of the last step, and save a checkpoint if one is due."""
        line, done = record.to_json().encode() + b"\n", len(self.run.history)
        if done == self.run.start + 1 or state.memory.keys() != self._checked:
            self._check_memory(state)  # now, and not at the first checkpoint, hours later
        self._digest.update(line)
        if self.first:
            self._require_lock()
            self.directory.append(line)
        if self.every and done % self.every == 0 and done < self.run.steps:
            self.checkpoint(state)
        if time.monotonic() > self._due:
            self.write_artifacts()

    def checkpoint(self, state: State, *, last: bool = False) -> None:
        """Save everything that is not a function of the step.

        last: no step follows; the checkpoint is complete when this returns.
        """
        backend, done = self.run.backend, len(self.run.history)
        if done > self.run.start:  # otherwise it is the one that was resumed from
            kept = Kept(done, self.run.problem.fingerprint(), self._digest.hexdigest(), state.memory)
            self.writer.write(done, json.dumps(asdict(kept)).encode(), state.variables, last=last)
        x = backend.weights(state.x)
        if self.first:
            self.directory.write(self.run.problem.snapshot(x))

    def write_artifacts(self) -> None:
        """Bring account.json and the problem's files up to date with the history."""
        started = time.monotonic()
        if self.run.history and self.first:
            problem, history = self.run.problem, self.run.history
            account = account_of(self.run)
            known = ("seed", "versions", "findings", "verdict", "intervals")
            facts = {name: to_plain(getattr(account, name)) for name in known}
            self.directory.write({**problem.artifacts(history, facts), FILE: account.to_json()})
        ended = time.monotonic()
        self._due = ended + max(1.0, (ended - started) / SHARE)  # they grow with the history

    def _require_lock(self) -> None:
        if self.lock is not None:
            self.lock.require()

    def _check_memory(self, state: State) -> None:
        """Raise `InputError` if a checkpoint could not give the solver's memory back as it is."""
        self._checked = set(state.memory)
        for key, value in state.memory.items():
            if (odd := _unsavable(value, f"State.memory[{key!r}]")) is not None:
                raise InputError(
                    f"the solver {type(self.run.solver).__name__} cannot be saved: {odd}; keep None, booleans, numbers, "
                    "text, lists, and dictionaries with text as keys (a tensor as `tolist()`), or make it a variable"
                )


def _unsavable(value: Any, where: str) -> str | None:
    """What JSON would lose or change, and where it is."""
    if value is None or isinstance(value, bool | int | float | str):
        return None
    if isinstance(value, list):
        return next(filter(None, (_unsavable(each, f"{where}[{i}]") for i, each in enumerate(value))), None)
    if isinstance(value, dict):
        keys = next((f"{where} has the key {key!r}" for key in value if not isinstance(key, str)), None)
        return keys or next(filter(None, (_unsavable(each, f"{where}[{key!r}]") for key, each in value.items())), None)
    return f"{where} is a {type(value).__name__}"
