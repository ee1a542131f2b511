"""Read the directory of a run, whatever state it is in. No other module does."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bilevel.account import FILE, Account, Labels
from bilevel.answer import Answer
from bilevel.errors import DamagedError, InputError
from bilevel.recipe import Recipe
from bilevel.record import Record, average, averaged, read_records, warmup_steps
from bilevel.run_directory import RunDirectory
from bilevel.working_directory import directory_of

RECENT = 60.0  # seconds without a step after which a run is no longer taken to be at work, or ten of its steps


@dataclass(frozen=True)
class SavedRun:
    """A run as its directory describes it.

    recipe: the resolved recipe; empty if the file is missing.
    history: one record a step.
    account: what the run says about itself; None before the first step.
    notes: what is missing or unusual, in a sentence each.
    quiet: seconds since the last step was written.
    """

    path: Path
    recipe: Mapping[str, Any]
    history: Sequence[Record]
    account: Account | None = None
    notes: Sequence[str] = ()
    quiet: float = 0.0

    @property
    def seed(self) -> int | None:
        """The run's seed; None if it is unknown."""
        found = self._settings.get("seed")
        return found if isinstance(found, int) else self.account.seed if self.account else None

    @property
    def labels(self) -> Labels:
        """The names of its numbers."""
        return self.account.labels if self.account else Labels()

    @property
    def label(self) -> str:
        """A short name for the run."""
        return self.path.name or str(self.path)

    @cached_property
    def averaged(self) -> Sequence[Record]:
        """The steps that `average` is taken over; see `bilevel.record.averaged`."""
        return averaged(self.history)

    @property
    def warmup_steps(self) -> int:
        """Steps before the first one that could move the upper variable."""
        return warmup_steps(self.history)

    @property
    def state(self) -> str:
        """The progress of the run, in words."""
        done, planned = len(self.history), self._settings.get("steps")
        if not isinstance(planned, int):
            return f"{done} steps"
        if done >= planned:
            return f"complete, {done} steps"
        if done == 0:
            return f"no step of {planned} done: it has just started, or it failed before its first step"
        pace = float(np.median([record.seconds for record in self.history]))
        if self.quiet < max(RECENT, 10 * pace):
            return f"incomplete, {done} of {planned} steps: it seems to be running"
        return f"incomplete, {done} of {planned} steps: interrupted or failed (bilevel run --resume continues it)"

    @property
    def complete(self) -> bool:
        """Whether all steps are done, as far as that is known."""
        planned = self._settings.get("steps")
        return bool(self.history) and (not isinstance(planned, int) or len(self.history) >= planned)

    @cached_property
    def average(self) -> dict[str, float]:
        """The upper variable that the run comes to; see `bilevel.record.average`."""
        return average(self.history)

    @property
    def answer(self) -> Answer:
        """What the run comes to, and what to do next."""
        where = directory_of(self.path)
        if self.account is None:
            return Answer.of(Account(0, 0, {}), self.average, self.path, where)
        return Answer.of(self.account, self.average, self.path, where)

    def series(self, key: str, name: str | None = None) -> NDArray[np.float64]:
        """One number of every step (with `name`, that of `Record.named(key)`); NaN where a step lacks it."""
        values = [record.number(key) if name is None else record.named(key).get(name) for record in self.history]
        return np.array([np.nan if value is None else float(value) for value in values], dtype=np.float64)

    @property
    def _settings(self) -> Mapping[str, Any]:
        section = self.recipe.get("run")
        return section if isinstance(section, Mapping) else {}


def is_run(path: Path) -> bool:
    """Whether the directory holds a run."""
    directory = RunDirectory(path)
    return directory.recipe_file.exists() or directory.metrics_file.exists()


def read_run(path: Path) -> SavedRun:
    """Read a run directory. Raises `InputError`, naming file and line, for damaged files."""
    directory, notes = RunDirectory(path), []
    recipe: Mapping[str, Any] = {}
    if directory.recipe_file.exists():
        recipe = resolved_recipe(path)
    else:
        notes.append("recipe.yaml is missing, so settings and seed are unknown")
    history = read_records(directory.metrics_file)
    quiet = time.time() - directory.metrics_file.stat().st_mtime if history else 0.0
    account = Account.read(path / FILE) if (path / FILE).exists() else None
    if account is not None and account.steps != len(history):
        notes.append(f"{FILE} is from step {account.steps}, metrics.jsonl goes to step {len(history)}")
    return SavedRun(path, recipe, history, account, notes, quiet)


def resolved_recipe(path: Path) -> dict[str, Any]:
    """The resolved recipe of a run directory. Raises `InputError` if it is missing or damaged."""
    file = RunDirectory(path).recipe_file
    if not file.is_file():
        raise InputError(f"{path} is not a run: there is no {file.name}; name the output directory of `bilevel run`")
    try:
        recipe = Recipe.read(file).tree
    except InputError as error:
        raise DamagedError(str(error)) from error
    if not isinstance(recipe.get("problem"), dict):
        raise DamagedError(f"{file}: not a recipe that `bilevel run` wrote: it has no section `problem`")
    return recipe
