"""The mixes for single validation sets, beside the mix for all of them: what is said of them, and where it is kept."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

from rich.table import Table

from bilevel import Finding, account
from bilevel.files import write_atomic
from bilevel.run_directory import RunDirectory

FILE = "targets.json"
TITLE = "The mix for each target alone"
ALL = "all targets"


@dataclass(frozen=True)
class Mix:
    """The answer of one run.

    target: the validation set that it is for, or `ALL`.
    weights: source -> weight.
    intervals: source -> the ends of the 95% interval; empty where the run has no evidence for any.
    decision: the verdict on the weights; None if there is none.
    steps: how many steps the run took.
    """

    target: str
    weights: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    decision: str | None
    steps: int

    def cell(self, source: str) -> str:
        """The weight of a source, with its interval if there is one."""
        weight = f"{self.weights[source]:.3f}"
        if source not in self.intervals:
            return weight
        low, high = self.intervals[source]
        return f"{weight} ({low:.2f} to {high:.2f})"


def comparisons(mixes: Sequence[Mix]) -> list[str]:
    """What the answers say about the targets, in sentences. Only what the intervals of two runs tell apart is claimed."""
    alone = [mix for mix in mixes if mix.target != ALL]
    found = []
    for one, other in combinations(alone, 2):
        for source in [name for name in one.intervals if name in other.intervals]:
            more, less = sorted((one, other), key=lambda mix: mix.intervals[source], reverse=True)
            (low, high), (least, most) = more.intervals[source], less.intervals[source]
            if low > most:
                found.append(
                    f"{more.target!r} wants more of {source!r} than {less.target!r} does: {low:.2f} to {high:.2f}, against "
                    f"{least:.2f} to {most:.2f}"
                )
    unsure = [repr(mix.target) for mix in alone if not mix.intervals]
    if unsure:
        found.append(f"no intervals for {' and '.join(unsure)}: nothing is claimed about what the target wants")
    if not found:
        found.append("the targets are not told apart: for every source, their intervals overlap")
    return found


def table(mixes: Sequence[Mix]) -> Table:
    """A row for each source, heaviest first, and a column for each target; at the end the verdicts."""
    shown = Table(box=None, header_style="bold", pad_edge=False)
    shown.add_column("source")
    for mix in mixes:
        shown.add_column(mix.target, justify="right")
    for source in sorted(mixes[0].weights, key=lambda name: -mixes[0].weights[name]):
        shown.add_row(source, *(mix.cell(source) for mix in mixes))
    shown.add_row("verdict", *(mix.decision or "" for mix in mixes))
    return shown


def keep(run: Path, mixes: Sequence[Mix]) -> None:
    """Write the answers to `FILE` in the run's directory, and put them into the account that `bilevel report` shows."""
    sentences, file = comparisons(mixes), run / account.FILE
    rows = [[source, *(mix.cell(source) for mix in mixes)] for source in mixes[0].weights]
    shown = account.Table(TITLE, ("source", *(mix.target for mix in mixes)), rows)
    content = {"mixes": [asdict(mix) for mix in mixes], "findings": sentences}
    with RunDirectory(run).owned():
        said = account.Account.read(file)
        findings = [finding for finding in said.findings if finding.name != "targets"]
        findings += [Finding("targets", False, sentence) for sentence in sentences]
        tables = [*(table for table in said.tables if table.title != TITLE), shown]
        write_atomic(run / FILE, json.dumps(content, indent=1, ensure_ascii=False))
        write_atomic(file, dataclasses.replace(said, findings=findings, tables=tables).to_json())
