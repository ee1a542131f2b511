"""Progress in a notebook: one output, which is replaced as the run goes on."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from bilevel.hookspecs import hookimpl
from bilevel.loggers.progress import MOST_BARS, headline, time_left
from bilevel.palette import ACCENT
from bilevel.plaintext import escape
from bilevel.terminal import REFRESH, in_notebook

if TYPE_CHECKING:
    from bilevel.run import Run


class NotebookLogger:
    """Shows the step, the remaining time, losses, and the upper variable as bars."""

    def __init__(self) -> None:
        self._output: Any = None
        self._updated = 0.0

    @hookimpl
    def bilevel_run_start(self, run: Run) -> None:
        """Begin the output, below the cell."""
        if in_notebook():
            from IPython.display import HTML, display

            self._output = display(HTML(as_html(run)), display_id=True)
            self._updated = time.monotonic()

    @hookimpl
    def bilevel_step_end(self, run: Run) -> None:
        """Show the step."""
        if time.monotonic() - self._updated >= REFRESH:
            self._update(run)

    @hookimpl
    def bilevel_run_end(self, run: Run) -> None:
        """Show the last step."""
        self._update(run)
        self._output = None

    def _update(self, run: Run) -> None:
        if self._output is not None:
            from IPython.display import HTML

            self._output.update(HTML(as_html(run)))
            self._updated = time.monotonic()


def as_html(run: Run) -> str:
    """What a run has come to, as HTML."""
    done = len(run.history)
    bar = Markup("<progress value='{}' max='{}' style='width:20em;accent-color:{}'></progress> step {} of {}").format(
        done, run.steps, ACCENT[0], done, run.steps
    )
    if not run.history:
        return str(bar)
    last = run.history[-1]
    left = time_left(run) if done < run.steps else ""
    rows = list(last.upper.items())
    largest = max((abs(value) for _, value in rows), default=0.0) or 1.0
    table = Markup("").join(
        Markup(
            "<tr><td style='text-align:left'>{}</td><td style='text-align:left'><div style='width:{:.2f}em;height:.7em;"
            "background:{}'></div></td><td>{:.3f}</td></tr>"
        ).format(escape(name), 15 * abs(value) / largest, ACCENT[0], value)
        for name, value in rows[:MOST_BARS]
    )
    more = Markup("<tr><td>and {} more</td></tr>").format(len(rows) - MOST_BARS) if len(rows) > MOST_BARS else ""
    return str(
        Markup("<div>{} {}<br><small>{}</small><table>{}{}</table></div>").format(
            bar, left, escape(headline(last, run.problem.labels)), table, more
        )
    )


logger = NotebookLogger()
