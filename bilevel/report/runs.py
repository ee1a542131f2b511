"""Run directories as a report sees them, and which of them are seeds of one recipe."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from bilevel.errors import InputError
from bilevel.plain import flatten
from bilevel.record import Record, average, averaged, read_records, warmup_steps
from bilevel.run_directory import RunDirectory

NOT_THE_RECIPE = {"run.seed", "run.output", "run.checkpoint_every", "run.keep_checkpoints"}
"""Settings in which runs of one recipe may differ."""

RECENT = 60.0  # seconds without a step after which a run is no longer taken to be at work, or ten of its steps


@dataclass(frozen=True)
class ReadRun:
    """What there is in a run directory.

    recipe: resolved; empty if the file is missing.
    history: one record a step.
    learned: weights.json, where the problem writes one.
    notes: what is missing or odd, a sentence each.
    quiet: seconds since the last step was written.
    """

    path: Path
    recipe: Mapping[str, Any]
    history: Sequence[Record]
    learned: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    quiet: float = 0.0

    @property
    def seed(self) -> int | None:
        """The run's seed, where it is known."""
        found = self._settings.get("seed", self.learned.get("seed"))
        return found if isinstance(found, int) else None

    @property
    def label(self) -> str:
        """What the report calls the run."""
        return self.path.name or str(self.path)

    @cached_property
    def averaged(self) -> list[Record]:
        """The steps that `average` is taken over; see `bilevel.record.averaged`."""
        return averaged(self.history)

    @property
    def warmup_steps(self) -> int:
        """Steps before the first one that could move the upper variable."""
        return warmup_steps(self.history)

    @property
    def state(self) -> str:
        """How far the run is, as words."""
        done, planned = len(self.history), self._settings.get("steps")
        if not isinstance(planned, int):
            return f"{done} steps"
        if done >= planned:
            return f"complete, {done} steps"
        if done == 0:
            return f"no step of {planned} done: it has just begun, or failed before its first step"
        pace = float(np.median([record.seconds for record in self.history]))
        if self.quiet < max(RECENT, 10 * pace):
            return f"incomplete, {done} of {planned} steps: it seems to be running"
        return f"incomplete, {done} of {planned} steps: interrupted or failed (bilevel run --resume goes on)"

    @property
    def complete(self) -> bool:
        """Whether all steps are done, as far as that is known."""
        planned = self._settings.get("steps")
        return bool(self.history) and (not isinstance(planned, int) or len(self.history) >= planned)

    @cached_property
    def average(self) -> dict[str, float]:
        """The upper variable that the run comes to; see `bilevel.record.average`."""
        return average(self.history)

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


def read_run(path: Path) -> ReadRun:
    """Read a run directory, whatever state it is in. Raises `InputError` (file and line) for files that are damaged."""
    directory, notes = RunDirectory(path), []
    recipe: Any = {}
    if directory.recipe_file.exists():
        try:
            recipe = yaml.safe_load(directory.recipe_file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{directory.recipe_file}: not valid YAML: {error}") from error
        if not isinstance(recipe, dict):
            raise InputError(f"{directory.recipe_file}: not a recipe, but {recipe!r}")
    else:
        notes.append("recipe.yaml is missing, so settings and seed are unknown")
    history, quiet = [], 0.0
    if directory.metrics_file.exists():
        history = read_records(directory.metrics_file)
        quiet = time.time() - directory.metrics_file.stat().st_mtime
    learned = _read_learned(path / "weights.json")
    if learned and learned.get("steps", len(history)) != len(history):
        notes.append(f"weights.json is from step {learned['steps']}, metrics.jsonl goes to step {len(history)}")
    return ReadRun(path, recipe, history, learned, notes, quiet)


def _read_learned(file: Path) -> Mapping[str, Any]:
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: not what a run writes there (an object)")
    return content


@dataclass(frozen=True)
class Group:
    """Runs of one recipe, on the same data and model, that differ in their seed.

    name: short, and different from that of other groups.
    runs: all of them.
    counted: those that statistics over seeds use: as far as the furthest, and no seed twice.
    notes: why a run is not counted.
    """

    name: str
    runs: Sequence[ReadRun]
    counted: Sequence[ReadRun]
    notes: Sequence[str] = ()

    @property
    def first(self) -> ReadRun:
        """A run that stands for all in what they have in common."""
        return (self.counted or self.runs)[0]

    @cached_property
    def names(self) -> list[str]:
        """Names of the upper variable, the largest average first."""
        means = {name: np.mean([run.average[name] for run in self.counted]) for name in self._common("upper")}
        return sorted(means, key=lambda name: -means[name])

    @cached_property
    def is_distribution(self) -> bool:
        """Whether the upper variable is a set of weights: never negative, and summing to 1 at every step."""
        rows = [list(record.upper.values()) for run in self.counted for record in run.history]
        return len(self.names) > 1 and all(min(row) >= 0 and abs(sum(row) - 1) < 1e-3 for row in rows)

    def stacked(self, key: str, name: str | None = None) -> NDArray[np.float64]:
        """A number of every step of the counted runs. Shape: (runs, steps)."""
        return np.array([run.series(key, name) for run in self.counted])

    def parts(self, key: str) -> list[str]:
        """The names under which the mapping `key` holds numbers, in the order of `names` where they are the same."""
        found = self._common(key)
        return [name for name in self.names if name in found] + [name for name in found if name not in self.names]

    def _common(self, key: str) -> list[str]:
        """Names that every counted run has, in the order of the first."""
        each = [dict.fromkeys(name for record in run.history for name in record.named(key)) for run in self.counted]
        return [name for name in each[0] if all(name in names for names in each)] if each else []


def group_runs(runs: Sequence[ReadRun]) -> list[Group]:
    """Put seeds of one recipe together, in the order in which the recipes first appear."""
    together: dict[str, list[ReadRun]] = {}
    for run in runs:
        together.setdefault(json.dumps(identity(run), sort_keys=True, default=str), []).append(run)
    members = list(together.values())
    names = _names(members)
    return [Group(name, group, *_count(group)) for name, group in zip(names, members, strict=True)]


def identity(run: ReadRun) -> dict[str, Any]:
    """What makes a run one of this recipe: its settings, and the content of its data and model."""
    settings = {key: value for key, value in flatten(run.recipe).items() if key not in NOT_THE_RECIPE}
    known = {key: run.learned[key] for key in ("data", "model") if key in run.learned}
    return {**settings, **flatten(known)}


def differences(groups: Sequence[Group]) -> dict[str, list[Any]]:
    """Setting -> its value in each group, for the settings that are not the same in all."""
    each = [identity(group.first) for group in groups]
    keys = dict.fromkeys(key for settings in each for key in settings)
    return {key: [s.get(key) for s in each] for key in keys if len({json.dumps(s.get(key), default=str) for s in each}) > 1}


def _count(runs: Sequence[ReadRun]) -> tuple[list[ReadRun], list[str]]:
    """The runs that statistics over seeds may use, and why the others are left out."""
    furthest = max(len(run.history) for run in runs)
    counted: dict[Any, ReadRun] = {}
    notes = []
    for run in runs:
        if not run.history:
            continue
        key = run.path if run.seed is None else run.seed
        if len(run.history) < furthest:
            notes.append(f"{run.label} has {len(run.history)} of {furthest} steps and is left out of means over seeds")
        elif key in counted:
            notes.append(f"{run.label} repeats seed {key} of {counted[key].label} and is left out of means over seeds")
        else:
            counted[key] = run
    return list(counted.values()), notes


def _names(members: Sequence[Sequence[ReadRun]]) -> list[str]:
    """By the settings in which they differ, if those are few and short; else by their directories."""
    each = [identity(runs[0]) for runs in members]
    keys = [key for key in dict.fromkeys(k for s in each for k in s) if len({str(s.get(key)) for s in each}) > 1]
    if 1 <= len(keys) <= 2:
        names = [", ".join(f"{key.rpartition('.')[2]} {settings.get(key)}" for key in keys) for settings in each]
        if all(len(name) <= 40 for name in names) and len(set(names)) == len(names):
            return names
    names = [_together([run.label for run in runs]) for runs in members]
    return names if len(set(names)) == len(names) else [str(runs[0].path) for runs in members]


def _together(labels: Sequence[str]) -> str:
    whole = ", ".join(labels)
    return whole if len(whole) <= 40 or len(labels) == 1 else f"{labels[0]} and {len(labels) - 1} more"
