"""What a report says in words and numbers about the runs of one recipe: the upper variable, and whether to trust it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from bilevel.account import Finding
from bilevel.report.groups import Group
from bilevel.run_reader import SavedRun
from bilevel.statistics import Interval, interval

UNKNOWN = (float("nan"), float("nan"))


@dataclass(frozen=True)
class UpperRow:
    """One entry of the upper variable.

    final: after the last step (mean over seeds).
    average: what the run comes to (see `bilevel.record.average`). Its interval is the run's own, from account.json; where
        there are several seeds, it is over these, which share the rows. There is none where the run gives none.
    each: the average of every counted run.
    """

    name: str
    final: float
    average: Interval
    each: Sequence[float]


def upper_rows(group: Group) -> list[UpperRow]:
    """The upper variable, its largest entry first."""
    found = []
    for name in group.names:
        each = [run.average[name] for run in group.counted]
        if len(group.counted) > 1:
            average = interval(each)
        else:
            account = group.first.account
            low, high = account.intervals.get(name, UNKNOWN) if account else UNKNOWN
            average = Interval(each[0], low, high)
        final = float(np.mean([run.history[-1].upper[name] for run in group.counted]))
        average = average.within(0, 1) if group.is_distribution else average
        found.append(UpperRow(name, final, average, each))
    return found


@dataclass(frozen=True)
class Statement:
    """A finding of one run, or of several under one heading.

    heading: empty for a finding of a single run, whose sentence says it all.
    sentences: one sentence; with several runs, one for each run that says something, after the run's name.
    where: the number of runs in which it is flagged, in words; empty if there is only one run.
    passed: whether it was tested, and passed in every run.
    """

    flagged: bool
    heading: str
    sentences: Sequence[str]
    where: str = ""
    passed: bool = False


def statements(group: Group) -> list[Statement]:
    """The findings, flagged ones first: those of the single runs, from their account.json, and those over seeds."""
    speaking = [run for run in group.runs if run.account and run.account.findings]
    found: dict[str, list[tuple[SavedRun, Finding]]] = {}
    for run in speaking:
        assert run.account is not None
        for finding in run.account.findings:
            found.setdefault(finding.name, []).append((run, finding))
    listed = []
    for name, entries in found.items():
        flags = sum(finding.flagged for _, finding in entries)
        if len(group.runs) == 1:
            listed += [Statement(f.flagged, "", [f.sentence], passed=f.passed) for _, f in entries]
        else:
            sentences = [f"{run.label}: {finding.sentence}" for run, finding in entries]
            where = f"flagged in {flags} of {len(speaking)} runs"
            passed = all(finding.passed for _, finding in entries)
            listed.append(Statement(flags > 0, name.replace("-", " "), sentences, where, passed))
    over_seeds = [Statement(finding.flagged, "", [finding.sentence]) for finding in _over_seeds(group)]
    return sorted([*over_seeds, *listed], key=lambda statement: not statement.flagged)


def _over_seeds(group: Group) -> list[Finding]:
    """Whether neighbors in the ranking differ by more than their spread over seeds: paired by seed, Student's t."""
    n = len(group.counted)
    if n < 2 or not group.is_distribution:
        return []
    unclear = []
    for upper, lower in pairwise(group.names):
        difference = interval([run.average[upper] - run.average[lower] for run in group.counted])
        if not difference.excludes_zero:
            numbers = f"{difference.mean:+.3f}, 95% from {difference.low:+.3f} to {difference.high:+.3f}"
            unclear.append(f"{upper} and {lower} ({numbers.replace('-', '−')})")
    if not unclear:  # which says nothing about other rows: seeds that share the data agree on what is noise in them
        return []
    words = f"within the spread over {n} seeds: do not read an order into {'; '.join(unclear)}; more seeds would narrow this"
    return [Finding("seeds-disagree", True, words)]
