"""Whether a model that a baseline trained has learned anything: without that, its weights only say where they started."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bilevel import Finding
from bilevel.record import Record
from bilevel.statistics import t_quantile

NAME = "nothing-learned"
"""The name of the finding."""


def nothing_learned(method: str, model: str, history: Sequence[Record], lr: str) -> list[Finding]:
    """A flagged finding if the model's training loss did not fall by more than its noise; nothing if it did.

    Each source's losses are compared between the first and the last third of the steps that saw the source, and the mean
    over sources of the falls with the 95% point of Student's t times its standard error. A model that learns nothing is
    taken to have learned something in 2.5% of all runs.

    model: which model of the method it is. history: the steps that trained it. lr: its step size, in words.
    """
    sources = sorted({name for record in history for name in record.named("lower_parts")})
    series = [
        np.array([record.named("lower_parts")[name] for record in history if name in record.named("lower_parts")])
        for name in sources
    ]
    series = [losses for losses in series if len(losses) >= 6]  # two in every third, or there is no variance
    remedy = "(baseline.lr, or `lr` of its entry in compare.methods)"
    if not series:
        words = f"the {model} of {method} took {len(history)} steps, too few to tell whether it has learned anything"
        return [Finding(NAME, True, f"{words}; raise run.steps")]
    fall, error, degrees = _fall(series)
    margin = t_quantile(degrees) * error
    if fall > margin:
        return []
    words = f"the training loss of the {model} of {method} fell by {fall:.4f}, which its noise (± {margin:.4f}) explains"
    advice = f"so that the weights say nothing: raise its step size of {lr} {remedy}, ten times at a time, or run.steps"
    if fall < -margin:
        words = f"the training loss of the {model} of {method} rose by {-fall:.4f} ± {margin:.4f}"
        advice = f"so that the weights say nothing: lower its step size of {lr} {remedy}"
    return [Finding(NAME, True, f"{words}, {advice}")]


def _fall(series: Sequence[NDArray[np.float64]]) -> tuple[float, float, int]:
    """The mean over series of how much the last third is below the first, its standard error and its degrees of freedom."""
    falls, variances, degrees = [], [], 0
    for losses in series:
        third = len(losses) // 3
        first, last = losses[:third], losses[-third:]
        falls.append(first.mean() - last.mean())
        variances.append((first.var(ddof=1) + last.var(ddof=1)) / third)
        degrees += 2 * (third - 1)
    return float(np.mean(falls)), math.sqrt(sum(variances)) / len(series), degrees
