"""A run in a few numbers: its length, its speed, and what never changed and so needs no chart."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bilevel.report.groups import Group


def facts(group: Group) -> dict[str, str]:
    """The facts over all steps and seeds, as a mapping of names to values in words."""
    if not group.counted:
        return {}
    steps = len(group.first.history)
    seconds, size = group.stacked("seconds"), group.stacked("size")
    found = {"Steps": f"{steps:,}"}
    if held := group.first.warmup_steps:
        found["Warm-up steps"] = f"{held:,}"
    if np.nansum(size) > 0:
        found["Throughput"] = f"{np.nansum(size) / max(float(np.nansum(seconds)), 1e-9):,.0f} {group.labels.unit}/s"
    found["Seconds a step"] = f"{np.nanmedian(seconds):.3g}"
    found["Time" if len(group.counted) == 1 else "Time a seed"] = _clock(float(np.nansum(seconds)) / len(group.counted))
    penalty, held_bytes = group.stacked("penalty"), group.stacked("optimizer_bytes")
    if constant(penalty):
        found["Penalty"] = f"{np.nanmax(penalty):g}"
    if constant(held_bytes) and (most := float(np.nanmax(held_bytes))) > 0:
        divisor, unit = byte_unit(most)
        found["Optimizer memory"] = f"{most / divisor:.3g} {unit}"
    return found


def constant(values: NDArray[np.float64]) -> bool:
    """Whether there are values and all of them are the same."""
    known = values[np.isfinite(values)]
    return len(known) > 0 and bool((known == known[0]).all())


def byte_unit(most: float) -> tuple[float, str]:
    """The divisor that converts a number of bytes to a readable unit, and the name of that unit."""
    for divisor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if most >= divisor:
            return divisor, unit
    return 1.0, "bytes"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
