"""Group the runs that are seeds of one recipe, with what they have in common."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bilevel.account import Labels
from bilevel.plain import flatten
from bilevel.run_reader import SavedRun

NOT_THE_RECIPE = {"run.seed", "run.output", "run.checkpoint_every", "run.keep_checkpoints", "run.checkpoint_in_background"}
"""Settings in which runs of one recipe may differ."""


@dataclass(frozen=True)
class Group:
    """Runs of one recipe, on the same data and model, that differ in their seed.

    name: short, and different from that of other groups.
    runs: all of them.
    counted: those that statistics over seeds use: as far as the furthest, and no seed twice.
    notes: why a run is not counted.
    """

    name: str
    runs: Sequence[SavedRun]
    counted: Sequence[SavedRun]
    notes: Sequence[str] = ()

    @property
    def first(self) -> SavedRun:
        """One of the runs, for what all have in common."""
        return (self.counted or self.runs)[0]

    @property
    def labels(self) -> Labels:
        """The names of the numbers."""
        return self.first.labels

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

    @cached_property
    def steps(self) -> NDArray[np.int64]:
        """How many steps were done at each record. Shape: (records,)."""
        return np.array([record.step + 1 for record in self.first.history], dtype=np.int64)

    def stacked(self, key: str, name: str | None = None) -> NDArray[np.float64]:
        """One number at every step of the counted runs. Shape: (runs, steps)."""
        return np.array([run.series(key, name) for run in self.counted])

    def parts(self, key: str) -> list[str]:
        """The names under which the mapping `key` holds numbers, in the order of `names` where they are the same."""
        found = self._common(key)
        return [name for name in self.names if name in found] + [name for name in found if name not in self.names]

    def _common(self, key: str) -> list[str]:
        """The names that every counted run has, in the order of the first run."""
        each = [dict.fromkeys(name for record in run.history for name in record.named(key)) for run in self.counted]
        return [name for name in each[0] if all(name in names for names in each)] if each else []


def group_runs(runs: Sequence[SavedRun]) -> list[Group]:
    """Group the seeds of each recipe, in the order in which the recipes first appear."""
    together: dict[str, list[SavedRun]] = {}
    for run in runs:
        together.setdefault(json.dumps(identity(run), sort_keys=True, default=str), []).append(run)
    members = list(together.values())
    names = _names(members)
    return [Group(name, group, *_count(group)) for name, group in zip(names, members, strict=True)]


def identity(run: SavedRun) -> dict[str, Any]:
    """The key of a run's group: its settings, and the content of its data and model."""
    settings = {key: value for key, value in flatten(run.recipe).items() if key not in NOT_THE_RECIPE}
    return {**settings, **(flatten(run.account.identity) if run.account else {})}


def differences(groups: Sequence[Group]) -> dict[str, list[Any]]:
    """The settings that differ between groups, each with its value in every group."""
    each = [identity(group.first) for group in groups]
    keys = dict.fromkeys(key for settings in each for key in settings)
    return {key: [s.get(key) for s in each] for key in keys if len({json.dumps(s.get(key), default=str) for s in each}) > 1}


def _count(runs: Sequence[SavedRun]) -> tuple[list[SavedRun], list[str]]:
    """The runs that statistics over seeds may use, and why the others are left out."""
    furthest = max(len(run.history) for run in runs)
    counted: dict[Any, SavedRun] = {}
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


def _names(members: Sequence[Sequence[SavedRun]]) -> list[str]:
    """Name groups by the settings in which they differ, if those are few and short; else by their directories."""
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
