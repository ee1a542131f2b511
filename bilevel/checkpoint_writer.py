"""Writes the checkpoints of a run, while training waits or in the background of the next steps.

In the background, every process writes its files in a thread, which does not communicate. At the end of each step the
processes tell each other whether they are done, in the message that they exchange there anyway; when all are, the first one
completes the checkpoint, which before that is a hidden directory that nobody takes for one.
"""

from __future__ import annotations

import logging
import shutil
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bilevel import checkpoint
from bilevel.agreement import Outcome, on_first, results, together, when_done
from bilevel.backend import Backend, Variable
from bilevel.background import Background
from bilevel.errors import InputError, NonFiniteError
from bilevel.files import remove
from bilevel.free_memory import free_memory
from bilevel.lock import Lock
from bilevel.run_directory import RunDirectory
from bilevel.sealed import Seal, write_sealed

log = logging.getLogger("bilevel")

PATIENCE = 5.0  # seconds of waiting for a checkpoint after which it is said
SHARE = 0.5  # of the memory that is free before the first step, which copies may take: the steps need some, too


@dataclass(frozen=True)
class _Underway:
    """A checkpoint that is being written.

    steps: that were done when it was begun.
    part: the directory that is to become it.
    run: the content of its run.json.
    work: writes the files of this process.
    """

    steps: int
    part: Path
    run: bytes
    work: Background[Mapping[str, Seal]]


class CheckpointWriter:
    """Writes one checkpoint at a time. All processes call its methods alike.

    keep: the number of checkpoints to keep.
    background: whether variables are copied, and written while the next steps change them.
    lock: that of the directory, in the first process.
    """

    def __init__(self, backend: Backend, directory: RunDirectory, keep: int, background: bool, lock: Lock | None) -> None:
        self.backend = backend
        self.directory = directory
        self.keep = keep
        self.background = background
        self.lock = lock
        self._underway: _Underway | None = None
        self._begun = -1  # the steps of the newest checkpoint

    def require_room(self, size: int) -> None:
        """Raise `InputError` if the disk has no room for checkpoints of about so many bytes.

        Where a machine has not enough memory to copy them, they are written while training waits, and that is said.
        """
        on_first(self.backend, lambda: self._require_disk(size))
        self.background = self.background and self._has_memory(size)

    def write(self, steps: int, run: bytes, variables: Sequence[Variable], *, last: bool) -> None:
        """Write a checkpoint of the variables as they are now; nothing if there is one of these steps.

        run: the content of its run.json.
        last: no step follows, so that nothing is copied, and the checkpoint is complete when this returns.

        Waits for the checkpoint before, if that is still being written, and raises what was wrong with it.
        """
        if steps == self._begun:
            return self.finish() if last else None
        self.finish()
        prepared: list[Callable[[], Mapping[str, Seal]]] = []
        part = on_first(self.backend, lambda: self._begin(steps))
        copy = self.background and not last
        together(self.backend, lambda: prepared.append(self.backend.save(part, variables, copy=copy)))
        self._begun, self._underway = steps, _Underway(steps, part, run, Background(prepared[0]))
        if not copy:
            self._complete(self._waited_for())

    @property
    def outcome(self) -> Outcome[Mapping[str, Seal]] | None:
        """What this process has to tell the others: the seals of its files, or why they could not be written."""
        return self._underway.work.outcome if self._underway is not None else None

    def settle(self, outcomes: Sequence[Outcome[Mapping[str, Seal]] | None]) -> None:
        """Complete the checkpoint, if the outcomes of all processes say that all of it is written.

        Raises the error of the first process that could not write.
        """
        if self._underway is not None:
            try:
                seals = results([outcome for outcome in outcomes if outcome is not None])
            except BaseException:
                self._drop()
                raise
            if len(seals) == len(outcomes):
                self._complete(seals)

    def finish(self) -> None:
        """Wait until the checkpoint that is being written, if there is one, is complete."""
        if self._underway is not None:
            self._complete(self._waited_for(f"waiting for the checkpoint after {self._underway.steps} steps to be written"))

    def leave(self, error: BaseException) -> None:
        """End the run by an error: complete the checkpoint that is being written, if all processes know of the error.

        Where one of several has failed, the others cannot be asked any more, and the checkpoint before is the newest one.
        """
        if self._underway is None:
            return
        alone = self.backend.shard.world_size == 1
        if not isinstance(error, NonFiniteError) and not (alone and isinstance(error, Exception)):
            self._drop()
            return
        steps = self._underway.steps
        try:
            self.finish()
        except Exception as failed:
            log.warning("there is no checkpoint after %d steps: %s", steps, failed)

    def _require_disk(self, each: int) -> None:
        parent = self.directory.path
        while not parent.exists():
            parent = parent.parent
        free = shutil.disk_usage(parent).free
        there = self.directory.checkpoint_bytes()  # newer ones replace them
        needed = max(each, (self.keep + 1) * each - there)
        if free < needed:
            raise InputError(
                f"not enough disk for checkpoints: {self.directory.path} has {_size(free)} free, and needs {_size(needed)} "
                f"more for {self.keep + 1} checkpoints of about {_size(each)}"
                + (f" ({_size(there)} are there already)" if there else "")
                + "; free some, choose another --output, or lower run.keep_checkpoints"
            )

    def _has_memory(self, each: int) -> bool:
        """Whether every machine has room for copies of what its processes hold."""
        machines = self.backend.all_gather((socket.gethostname(), free_memory()))
        for machine, free in machines:
            needed = each * sum(other == machine for other, _ in machines) // len(machines)
            if free is not None and needed > SHARE * free:
                log.info(
                    "training will wait while checkpoints are written: a copy takes %s of memory, and %s of %s are free",
                    *(_size(needed), _size(free), machine),
                )
                return False
        return True

    def _begin(self, steps: int) -> Path:
        self._require_lock()
        return self.directory.begin_checkpoint(steps)

    def _waited_for(self, saying: str | None = None) -> list[Mapping[str, Seal]]:
        """The seals of all processes, when all of them have written their files."""
        assert self._underway is not None
        try:
            return when_done(self.backend, self._underway.work, PATIENCE, lambda: log.info(saying) if saying else None)
        except BaseException:
            self._drop()
            raise

    def _complete(self, seals: Sequence[Mapping[str, Seal]]) -> None:
        underway = self._underway
        assert underway is not None

        def complete() -> None:
            run = {checkpoint.RUN: write_sealed(underway.part / checkpoint.RUN, [underway.run])}
            files = {name: seal for each in (*seals, run) for name, seal in each.items()}
            checkpoint.write_manifest(underway.part, files)
            self._require_lock()
            self.directory.finish_checkpoint(underway.part, underway.steps, self.keep)

        try:
            on_first(self.backend, complete)
        finally:
            self._drop()

    def _drop(self) -> None:
        """Nothing is being written any more; what was, and has not become a checkpoint, is removed."""
        assert self._underway is not None
        if self.backend.shard.rank == 0:
            remove(self._underway.part)
        self._underway = None

    def _require_lock(self) -> None:
        if self.lock is not None:
            self.lock.require()


def _size(count: int) -> str:
    """A number of bytes for a person: "512 bytes", "3.2 MB"."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
