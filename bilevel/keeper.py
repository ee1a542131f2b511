"""What a run keeps on disk: records, the problem's files, and checkpoints from which it can be resumed."""

from __future__ import annotations

import json
import shutil
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bilevel.account import FILE, Account
from bilevel.agreement import on_first
from bilevel.errors import InputError
from bilevel.files import write_atomic
from bilevel.plain import to_plain
from bilevel.record import Record
from bilevel.run import Run
from bilevel.run_directory import RunDirectory
from bilevel.solver import State


class Keeper:
    """Writes a run's directory: records, artifacts and checkpoints. The first process writes; all save their shards."""

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
        # the steps after the checkpoint will be done again
        on_first(self.run.backend, lambda: self.directory.write_history(self.run.history))

    def _find(self) -> tuple[int, Path, dict[str, Any], list[Record]] | None:
        """(steps done, where, solver's memory, records) of the last checkpoint; None for a new run."""
        checkpoint = self.directory.last_checkpoint()
        if checkpoint is None:
            self.directory.write_history([])
            return None
        steps, where = checkpoint
        if steps > self.run.steps:
            raise InputError(f"{where} has done {steps} steps already, and run.steps is {self.run.steps}")
        try:
            kept = json.loads((where / "run.json").read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"the checkpoint {where} cannot be read: {error}") from error
        if kept["fingerprint"] != self.run.problem.fingerprint():
            raise InputError(
                f"{where} was made with different data or a different model: their content has changed since; "
                "restore it, or start a new run in another --output"
            )
        return steps, where, kept["memory"], self.directory.read_history(steps)

    def after_step(self, state: State) -> None:
        """Record the last step, and save a checkpoint if one is due."""
        if self.first:
            self.directory.append(self.run.history[-1])
        done = len(self.run.history)
        if self.every and done % self.every == 0 and done < self.run.steps:
            self.checkpoint(state)
        elif time.monotonic() - self.written > 1.0:
            self.write_artifacts()

    def checkpoint(self, state: State) -> None:
        """Save everything that is not a function of the step."""
        backend, done = self.run.backend, len(self.run.history)
        part = on_first(backend, lambda: self.directory.begin_checkpoint(done))
        backend.save(part, state.variables)
        backend.all_gather(None)  # all have written
        kept = {"memory": state.memory, "fingerprint": self.run.problem.fingerprint()}
        if self.first:
            write_atomic(part / "run.json", json.dumps(kept))
        on_first(backend, lambda: self.directory.finish_checkpoint(part, self.keep))
        x = backend.weights(state.x)
        if self.first:
            self.directory.write(self.run.problem.snapshot(x))
        self.write_artifacts()

    def write_artifacts(self) -> None:
        """Bring account.json and the problem's files up to date with the history."""
        if self.run.history and self.first:
            problem, history = self.run.problem, self.run.history
            account = Account(
                steps=len(history),
                seed=self.run.seed,
                versions={name: version(name) for name in ("bilevel", "torch")},
                labels=problem.labels,
                findings=list(problem.findings(history)),
                tables=list(problem.tables(history)),
                identity=problem.identity(),
                verdict=problem.verdict(history),
                intervals=dict(problem.intervals(history)),
            )
            known = ("seed", "versions", "findings", "verdict", "intervals")
            facts = {name: to_plain(getattr(account, name)) for name in known}
            self.directory.write({**problem.artifacts(history, facts), FILE: account.to_json()})
        self.written = time.monotonic()

    def _check_disk(self, state: State) -> None:
        """Raise `InputError` if the disk has no room for the checkpoints."""
        state.activate(self.run.active, self.run.start, self.run.seed, self.run.backend)
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
