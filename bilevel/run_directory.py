"""The directory of a run: what is in it, who may write there, and how a run is resumed from it.

recipe.yaml       the resolved recipe
working_directory.json  what its relative paths are relative to; see `bilevel.working_directory`
metrics.jsonl     the record of every step, one a line
micro_batch.json  how many rows a process takes at a time, if that was chosen; see `bilevel.micro_batch`
account.json      findings, tables, labels, versions; see `bilevel.account`
checkpoints/      step-00000020/ ...; complete ones only
loggers/          by what services know this run; see `bilevel.loggers.identity`
inputs/           data and models that were given in memory, which the recipe names
.lock/            who is at work here, while someone is; see `bilevel.lock`
+ the problem's artifacts (weights.json), plots and TensorBoard events
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import yaml

from bilevel.errors import DamagedError, InputError
from bilevel.files import GrowingFile, hidden, leftovers, remove, remove_leftovers, write_atomic, write_through
from bilevel.lock import Lock, is_lock, owned
from bilevel.plain import flatten
from bilevel.recipe import Recipe, dump
from bilevel.record import Record, read_records
from bilevel.working_directory import FILE as WORKING_DIRECTORY
from bilevel.working_directory import METRICS, RECIPE, origin_text

MAY_CHANGE = {
    *("run.steps", "run.at_most", "run.output", "run.checkpoint_every", "run.keep_checkpoints"),
    "run.checkpoint_in_background",
}
"""Settings that may change when a run is resumed; any other change would make it another run. Loggers may change, too, and
so may the backend, except for its precision: a run can be resumed with more processes, or on another machine."""


_STEP = re.compile(r"step-(\d{8,})")


def _may_change(key: str) -> bool:
    logs = key == "run.loggers" or key.startswith("run.loggers.")
    return key in MAY_CHANGE or logs or (key.startswith("backend.") and key != "backend.dtype")


class RunDirectory:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._metrics = GrowingFile(self.metrics_file)

    @property
    def recipe_file(self) -> Path:
        """The resolved recipe."""
        return self.path / RECIPE

    @property
    def metrics_file(self) -> Path:
        """The record of every step, one a line; see `bilevel.record`."""
        return self.path / METRICS

    @property
    def micro_batch_file(self) -> Path:
        """How many rows a process takes at a time, if that was chosen."""
        return self.path / "micro_batch.json"

    @property
    def inputs(self) -> Path:
        """Data and models that were given in memory; they may be there before the run."""
        return self.path / "inputs"

    @property
    def checkpoints(self) -> Path:
        """The directory of the complete checkpoints."""
        return self.path / "checkpoints"

    def owned(self) -> AbstractContextManager[Lock]:
        """Be the only one who writes here. Raises `InputError`, naming the owner, if another process does."""
        return owned(self.path)

    def check_free(self) -> None:
        """Raise `InputError` if the directory already holds something."""
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"output {self.path} is a file; name a directory")
        if self._content() and not self._nothing_done():
            what = "holds another run" if self.recipe_file.exists() else "is not empty"
            raise InputError(
                f"the output directory {self.path} {what}; "
                "continue that run with --resume, or choose another directory with --output"
            )

    def check_same(self, recipe: Mapping[str, Any]) -> None:
        """Raise `InputError`, naming what differs, if this directory does not hold a run of the same recipe."""
        if not self.recipe_file.exists():
            raise InputError(f"there is no run to resume in {self.path} (no recipe.yaml there); run without --resume")
        before, now = flatten(Recipe.read(self.recipe_file).tree), flatten(yaml.safe_load(dump(recipe)))
        differing = sorted(
            key for key in before.keys() | now.keys() if before.get(key) != now.get(key) and not _may_change(key)
        )
        if differing:
            key = differing[0]
            raise InputError(
                f"{self.path} holds a run of a different recipe: {key} was {before.get(key)!r} and is now {now.get(key)!r}"
                + (f" (and {len(differing) - 1} more: {', '.join(differing[1:])})" if differing[1:] else "")
                + "; resume with the same recipe, or choose another --output"
            )

    def create(self, recipe: Mapping[str, Any]) -> None:
        """Create the directory if it is missing, write the recipe, and remove what a writer that was killed has left."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path / WORKING_DIRECTORY, origin_text(self.path, recipe))
        write_atomic(self.recipe_file, dump(recipe))
        for directory in (self.path, self.checkpoints):
            remove_leftovers(directory)

    def begin(self, recipe: Mapping[str, Any]) -> None:
        """Create the directory of a run without a step. The recipe is written last: it alone may be a user's own file."""
        self.write_history(b"")
        self.create(recipe)

    def holds_only(self, names: set[str], recipe: Mapping[str, Any]) -> bool:
        """Whether there is this recipe, and nothing but it and files of these names."""
        try:
            self.check_same(recipe)
        except InputError:
            return False
        return self._content() <= {self.recipe_file.name, WORKING_DIRECTORY, *names}

    def _content(self) -> set[str]:
        """The names of what is there, other than inputs, the lock, and what was left by a writer that was killed."""
        if not self.path.is_dir():
            return set()
        gone = {self.inputs, *leftovers(self.path)}
        return {path.name for path in self.path.iterdir() if path not in gone and not is_lock(path)}

    def _nothing_done(self) -> bool:
        """Whether all that is there was left by a run that ended before its first step."""
        own = {
            *(self.recipe_file.name, WORKING_DIRECTORY, self.metrics_file.name, self.micro_batch_file.name),
            *("tensorboard", "loggers", "wandb"),
        }
        empty = self.metrics_file.is_file() and self.metrics_file.stat().st_size == 0
        return empty and self._content() <= own

    def saved(self) -> dict[int, Path]:
        """Steps done -> the checkpoint, from the oldest to the newest. Other entries of the directory are not looked at."""
        found = self.checkpoints.iterdir() if self.checkpoints.is_dir() else ()
        named = ((_STEP.fullmatch(path.name), path) for path in found)
        return dict(sorted((int(match[1]), path) for match, path in named if match and path.is_dir()))

    def checkpoint_bytes(self) -> int:
        """The size of all checkpoints."""
        return sum(file.stat().st_size for path in self.saved().values() for file in path.iterdir())

    def begin_checkpoint(self, steps_done: int) -> Path:
        """An empty directory to write into; it becomes a checkpoint by `finish_checkpoint`."""
        self.close()
        remove_leftovers(self.checkpoints)
        part = hidden(self._checkpoint(steps_done))
        part.mkdir(parents=True)
        return part

    def finish_checkpoint(self, part: Path, steps_done: int, keep: int) -> None:
        """Turn the directory into a checkpoint, in one step; then remove this run's oldest checkpoints beyond `keep`."""
        write_through(part, deep=False)  # the files in it are on the disk
        part.rename(self._checkpoint(steps_done))
        write_through(self.checkpoints, deep=False)
        for old in list(self.saved().values())[:-keep]:
            remove(old)

    def _checkpoint(self, steps_done: int) -> Path:
        return self.checkpoints / f"step-{steps_done:08d}"

    def set_aside(self, steps: Sequence[int]) -> None:
        """Rename damaged checkpoints, so that they are neither resumed from nor counted among those to keep."""
        for step in steps:
            path = self._checkpoint(step)
            aside = path.with_name(f"damaged-{path.name}")
            remove(aside)
            path.rename(aside)

    def read_history(self, steps: int) -> tuple[list[Record], bytes]:
        """The records of the first `steps` steps, and their lines as they are.

        Raises `DamagedError` if some are missing or damaged.
        """
        records = read_records(self.metrics_file, steps)
        if len(records) < steps:
            raise DamagedError(f"{self.metrics_file} holds {len(records)} steps, and the checkpoint has done {steps}")
        return records, b"".join(line + b"\n" for line in self.metrics_file.read_bytes().split(b"\n")[:steps])

    def write_history(self, lines: bytes) -> None:
        """Replace the metrics file. The directory is made if it is missing."""
        self.close()
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomic(self.metrics_file, lines)

    def append(self, line: bytes) -> None:
        """Add the line of one step to the metrics file."""
        self._metrics.append(line)

    def close(self) -> None:
        """Let everybody, also on a network file system, see all the lines that were added."""
        self._metrics.close()

    def write(self, files: Mapping[str, str | bytes]) -> None:
        """Write the problem's artifacts."""
        self.close()
        for name, content in files.items():
            write_atomic(self.path / name, content)
