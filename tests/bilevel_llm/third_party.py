"""What somebody else would write: a plugin of one module, with a format of data, an exporter, a baseline and a finding of its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from packaging.version import Version

from bilevel.account import Finding
from bilevel.hookspecs import Register, hookimpl
from bilevel_llm.baselines.base import Baseline, Outcome, Selection, Task
from bilevel_llm.data.fields import string
from bilevel_llm.data.format import Evidence, Format
from bilevel_llm.data.layout import ChatLayout
from bilevel_llm.data.rows import Row, Turn
from bilevel_llm.exporters.exporter import Exporter
from bilevel_llm.exporters.weighted_data import WeightedData
from bilevel_llm.reweighting.trust import Trust

ROLES = {"asker": "user", "helper": "assistant", "moderator": "system"}


class Forum(Format):
    """`thread`: a list of {by, says}."""

    name = "forum"
    required = (("thread",),)
    evidence = Evidence.TURNS

    def read(self, fields: Mapping[str, Any], where: str) -> tuple[Turn, ...]:
        return tuple(Turn(ROLES[string(post, "by", where)], string(post, "says", where)) for post in fields["thread"])

    def layout(self, fields: Mapping[str, Any]) -> ChatLayout:
        return ChatLayout(self.name, ("thread",), "by", "says", ROLES)

    def write(self, row: Row) -> dict[str, Any]:
        names = {role: name for name, role in ROLES.items()}
        return {"thread": [{"by": names[turn.role], "says": turn.text} for turn in row.turns]}


class Shopping(Exporter):
    """A list of files, each with its weight."""

    package = "shopping-trainer"
    versions = ">=2"
    checked = "2.1"

    def export(self, data: WeightedData, version: Version) -> dict[str, str]:
        lines = [
            f"{source.weight:.2f} {file.name} {rows} rows of {source.layout}, read by {self.package} {version}\n"
            for source in data.sources
            for file, rows in source.files.items()
        ]
        return {"list.txt": "".join(lines)}


@dataclass(frozen=True)
class Shortest(Baseline):
    """The rows with the fewest tokens, so many of them.

    count: rows to select.
    """

    count: int = 12
    trains = False

    def most_rows(self, rows: int) -> int:
        return min(self.count, rows)

    def find(self, task: Task) -> Outcome:
        scores = {name: -table.lengths.astype(np.float64) for name, table in task.problem.source_tables.items()}
        selection = Selection.best(scores, self.most_rows(sum(map(len, scores.values()))))
        return Outcome(selection.shares, selection=selection)


def counted(trust: Trust) -> list[Finding]:
    """Always has something to say."""
    return [Finding("sources-counted", len(trust.names) > 2, f"there are {len(trust.names)} sources")]


@hookimpl
def bilevel_findings(register: Register) -> None:
    register("counted", f"{__name__}:counted")


@hookimpl
def bilevel_formats(register: Register) -> None:
    register("forum", f"{__name__}:Forum")


@hookimpl
def bilevel_exporters(register: Register) -> None:
    register("shopping", f"{__name__}:Shopping")


@hookimpl
def bilevel_baselines(register: Register) -> None:
    register("shortest", f"{__name__}:Shortest")
