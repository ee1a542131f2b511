"""What a report says in words and numbers about the runs of one recipe: the upper variable, and whether to trust it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from bilevel.report.runs import Group, ReadRun
from bilevel.statistics import Interval, interval, interval_of_series


@dataclass(frozen=True)
class UpperRow:
    """One entry of the upper variable.

    rows: rows of data behind it, where the run says so.
    final: after the last step (mean over seeds).
    average: over the second half of the steps. Its interval is over seeds where there are several, else by batch means.
    each: the average of every counted run.
    """

    name: str
    rows: int | None
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
            average = interval_of_series([record.upper[name] for record in group.first.averaged])
            average = Interval(each[0], average.low, average.high)
        final = float(np.mean([run.history[-1].upper[name] for run in group.counted]))
        average = average.within(0, 1) if group.is_distribution else average
        found.append(UpperRow(name, _rows_of(group.first, name), final, average, each))
    return found


@dataclass(frozen=True)
class Finding:
    """Something to know before using the result.

    kind: "flag" (a reason not to trust it), "fine", or "note" (the run does not say which of the two).
    head: what it is about, in a word or two.
    details: one sentence; with several runs, one for each in which it holds, behind the run's name.
    where: in how many of the runs, as words; empty if there is but one.
    """

    kind: str
    head: str
    details: Sequence[str]
    where: str = ""


def findings(group: Group) -> list[Finding]:
    """Flags first. What single runs say of themselves comes from their weights.json; over seeds, from their differences."""
    speaking = [run for run in group.runs if run.learned.get("trust")]
    found: dict[str, list[tuple[ReadRun, str, str]]] = {}
    for run in speaking:
        for sentence in run.learned["trust"]:
            head, colon, detail = str(sentence).partition(": ")
            found.setdefault(head, []).append((run, _kind(run.learned, sentence), detail if colon else ""))
    listed = []
    for head, entries in found.items():
        kind = next((kind for kind in ("flag", "note") if any(k == kind for _, k, _ in entries)), "fine")
        if len(group.runs) == 1:
            listed.append(Finding(kind, head, [detail for *_, detail in entries if detail]))
        else:
            details = [f"{run.label}: {detail}" if detail else run.label for run, _, detail in entries]
            listed.append(Finding(kind, head, details, f"{len(entries)} of {len(speaking)} runs"))
    order = ("flag", "note", "fine")
    return sorted([*_over_seeds(group), *listed], key=lambda finding: order.index(finding.kind))


def _over_seeds(group: Group) -> list[Finding]:
    """Whether neighbours in the ranking differ by more than their spread over seeds: paired by seed, Student's t."""
    n = len(group.counted)
    if n < 2 or not group.is_distribution:
        return []
    unclear = []
    for upper, lower in pairwise(group.names):
        difference = interval([run.average[upper] - run.average[lower] for run in group.counted])
        if not difference.excludes_zero:
            numbers = f"{difference.mean:+.3f}, 95% from {difference.low:+.3f} to {difference.high:+.3f}"
            unclear.append(f"{upper} and {lower} ({numbers.replace('-', '−')})")
    if not unclear:
        words = f"every neighbouring pair in the ranking differs by more than its spread over {n} seeds"
        return [Finding("fine", "order holds over seeds", [words])]
    words = f"do not read an order into {'; '.join(unclear)}; more seeds would narrow this"
    return [Finding("flag", f"within the spread over {n} seeds", [words])]


def _kind(learned: Mapping[str, Any], sentence: str) -> str:
    if not isinstance(learned.get("flags"), Mapping):
        return "note"
    return "flag" if sentence in learned["flags"].values() else "fine"


def _rows_of(run: ReadRun, name: str) -> int | None:
    """Rows of a source, from weights.json."""
    node: Any = run.learned
    for key in ("data", "sources", name, "rows"):
        node = node.get(key) if isinstance(node, Mapping) else None
    return node if isinstance(node, int) else None
