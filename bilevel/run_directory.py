"""The directory of a run: what is in it, who may write there, and how a run is resumed from it.

recipe.yaml       the resolved recipe
metrics.jsonl     the record of every step, one a line
account.json      findings, tables, labels, versions; see `bilevel.account`
checkpoints/      step-00000020/ ...; complete ones only
+ the problem's artifacts (weights.json), plots and TensorBoard events
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from bilevel.errors import InputError
from bilevel.files import write_atomic
from bilevel.plain import flatten
from bilevel.recipe import dump
from bilevel.record import Record, read_records

MAY_CHANGE = {"run.steps", "run.at_most", "run.output", "run.checkpoint_every", "run.keep_checkpoints"}
"""Settings that may change when a run is resumed; any other change would make it another run. The backend may change, too,
except for its precision: a run can be resumed with more processes, or on another machine."""


def _may_change(key: str) -> bool:
    return key in MAY_CHANGE or (key.startswith("backend.") and key != "backend.dtype")


class RunDirectory:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def recipe_file(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def metrics_file(self) -> Path:
        """The record of every step, one a line; see `bilevel.record`."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The directory of the complete checkpoints."""
        return self.path / "checkpoints"

    def check_free(self) -> None:
        """Raise `InputError` if the directory already holds something."""
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"output {self.path} is a file; name a directory")
        if self.path.is_dir() and any(self.path.iterdir()) and not self._nothing_done():
            what = "holds another run" if self.recipe_file.exists() else "is not empty"
            raise InputError(
                f"the output directory {self.path} {what}; "
                "continue that run with --resume, or choose another directory with --output"
            )

    def check_same(self, recipe: Mapping[str, Any]) -> None:
        """Raise `InputError`, naming what differs, if this directory does not hold a run of the same recipe."""
        if not self.recipe_file.exists():
            raise InputError(f"there is no run to resume in {self.path} (no recipe.yaml there); run without --resume")
        before, now = flatten(yaml.safe_load(self.recipe_file.read_text())), flatten(yaml.safe_load(dump(recipe)))
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
        """Create the directory if it is missing, and write the recipe."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomic(self.recipe_file, dump(recipe))

    def _nothing_done(self) -> bool:
        """Whether all that is there was left by a run that failed before its first step."""
        own = {self.recipe_file.name, self.metrics_file.name, "tensorboard"}
        empty = self.metrics_file.exists() and self.metrics_file.stat().st_size == 0
        return empty and {path.name for path in self.path.iterdir()} <= own

    def last_checkpoint(self) -> tuple[int, Path] | None:
        """(steps done, directory) of the newest complete checkpoint."""
        found = [(int(path.name.removeprefix("step-")), path) for path in self.checkpoints.glob("step-*")]
        return max(found, default=None)

    def begin_checkpoint(self, steps_done: int) -> Path:
        """An empty directory to write into; it becomes a checkpoint by `finish_checkpoint`."""
        part = self.checkpoints / f".part-{steps_done:08d}"
        if part.exists():  # left by a run that was killed while saving
            shutil.rmtree(part)
        part.mkdir(parents=True)
        return part

    def finish_checkpoint(self, part: Path, keep: int) -> None:
        """Turn the directory into a checkpoint, in one step; then remove this run's oldest checkpoints beyond `keep`."""
        final = part.with_name(part.name.replace(".part-", "step-"))
        if final.exists():  # a resumed run that stopped again at the same step; the content is the same
            shutil.rmtree(part)
            return
        part.rename(final)
        for old in sorted(self.checkpoints.glob("step-*"))[:-keep]:
            shutil.rmtree(old)

    def read_history(self, steps: int) -> list[Record]:
        """The records of the first `steps` steps. Raises `InputError` if some are missing or damaged."""
        records = read_records(self.metrics_file, steps)
        if [record.step for record in records] != list(range(steps)):
            raise InputError(f"{self.metrics_file} does not hold the {steps} steps that the checkpoint has done")
        return records

    def write_history(self, records: Sequence[Record]) -> None:
        """Replace the metrics file."""
        write_atomic(self.metrics_file, "".join(record.to_json() + "\n" for record in records))

    def append(self, record: Record) -> None:
        """Add one step to the metrics file."""
        with self.metrics_file.open("a") as file:
            file.write(record.to_json() + "\n")

    def write(self, files: Mapping[str, str | bytes]) -> None:
        """Write the problem's artifacts."""
        for name, content in files.items():
            write_atomic(self.path / name, content)
