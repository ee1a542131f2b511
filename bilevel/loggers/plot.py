"""`weights.png`: the report's chart of the upper variable. `losses.png`: of the training loss, if nothing is upper."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from bilevel.files import write_atomic
from bilevel.hookspecs import hookimpl
from bilevel.record import thinned

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bilevel.account import Account
    from bilevel.record import Record
    from bilevel.run import Run

log = logging.getLogger("bilevel")

MOST_POINTS = 2000  # of a curve: more than the picture's width can show


class PlotLogger:
    """Draws the run when it ends, complete or not."""

    @hookimpl
    def bilevel_run_end(self, run: Run) -> None:
        """Draw and write the picture. A run is not failed by a disk without room for it."""
        if run.output is not None and run.history:
            from bilevel.answer import account_of

            name = "weights.png" if run.history[0].upper else "losses.png"
            try:
                write_atomic(run.output / name, draw(thinned(run.history, MOST_POINTS), account_of(run)))
            except OSError as error:
                log.warning("%s is not drawn: %s", run.output / name, error.strerror or error)


def draw(history: Sequence[Record], account: Account) -> bytes:
    """The picture of a history, as PNG: the first chart that a report on it has."""
    from pathlib import Path

    from bilevel.report.charts import group_charts
    from bilevel.report.drawing import Inks
    from bilevel.report.groups import group_runs
    from bilevel.run_reader import SavedRun

    (group,) = group_runs([SavedRun(Path("run"), {}, history, account)])
    return group_charts(group, Inks(group.names))[0].png()


logger = PlotLogger()
