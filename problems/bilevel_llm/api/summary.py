"""The answer of a run in a few lines: as text, and as HTML for a notebook."""

from __future__ import annotations

import io

from markupsafe import Markup
from rich.table import Table

from bilevel.answer import Answer
from bilevel.palette import ACCENT
from bilevel.plaintext import escape
from bilevel.terminal import Terminal

_WIDTH = 100  # of the text, in characters
_BAR = 12.0  # of a weight of 1, in em


def as_text(answer: Answer, state: str) -> str:
    """A table of the weights, heaviest first, with the findings, the verdict and the commands to go on below.

    state: how far the run is, and where.
    """
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(answer.name)
    table.add_column("weight", justify="right")
    table.add_column("95% interval", justify="right")
    for row in _rows(answer):
        table.add_row(*row)
    # for Jupyter, rich would show it at once, and return nothing
    console = Terminal(file=io.StringIO(), width=_WIDTH, force_jupyter=False, color_system=None)
    console.print(table)
    for finding in answer.findings:
        console.print(f"- {finding.sentence}", soft_wrap=True)
    console.print(answer, soft_wrap=True)
    console.print(state, soft_wrap=True)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text.rstrip("\n")


def as_html(answer: Answer, state: str) -> str:
    """The same for a notebook, light or dark, with the weights as bars too."""
    head = Markup("<tr><th style='text-align:left'>{}</th><th>weight</th><th>95% interval</th><th></th></tr>").format(
        answer.name
    )
    rows = Markup("").join(
        Markup(
            "<tr><td style='text-align:left'>{}</td><td>{}</td><td>{}</td><td style='text-align:left'>"
            "<div style='width:{:.2f}em;height:.7em;background:{}'></div></td></tr>"
        ).format(escape(name), weight, interval, max(0.0, min(1.0, answer.values[name])) * _BAR, ACCENT[0])
        for name, weight, interval in _rows(answer)
    )
    verdict = [] if answer.verdict is None else [Markup("<b>→ {}</b>").format(escape(answer.verdict.sentence()))]
    lines = [
        *(Markup("- {}").format(escape(finding.sentence)) for finding in answer.findings),
        *verdict,
        *(
            Markup("{}: <code>{}</code>").format(escape(command.purpose), escape(command.line))
            for command in answer.commands
        ),
        Markup("{}").format(escape(state)),
    ]
    return str(Markup("<div><table>{}{}</table>{}</div>").format(head, rows, Markup("<br>").join(lines)))


def _rows(answer: Answer) -> list[tuple[str, str, str]]:
    spans = {name: f"{low:.3f} to {high:.3f}" for name, (low, high) in answer.intervals.items()}
    return [(name, f"{value:.3f}", spans.get(name, "unknown")) for name, value in answer.values.items()]
