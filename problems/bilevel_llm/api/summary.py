"""The weights of a run and whether to trust them, in a few lines: as text, and as HTML for a notebook."""

from __future__ import annotations

import io

from markupsafe import Markup
from rich.table import Table

from bilevel.account import Account
from bilevel.plaintext import escape as printable
from bilevel.run_reader import SavedRun
from bilevel.terminal import Terminal

_WIDTH = 100  # of the text, in characters
_BAR = 12.0  # of a weight of 1, in em


def as_text(run: SavedRun, account: Account) -> str:
    """A table of the weights, heaviest first, with the findings and the verdict below."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(account.labels.upper)
    table.add_column("weight", justify="right")
    table.add_column("95% interval", justify="right")
    for row in _rows(run, account):
        table.add_row(*row)
    console = Terminal(file=io.StringIO(), width=_WIDTH, force_jupyter=False)  # which would display it at once
    console.print(table)
    for sentence in _sentences(run, account):
        console.print(sentence, soft_wrap=True)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text.rstrip("\n")


def as_html(run: SavedRun, account: Account) -> str:
    """The same for a notebook, light or dark, with the weights as bars too."""
    rows = Markup("").join(
        Markup(
            "<tr><td style='text-align:left'>{}</td><td>{}</td><td>{}</td><td style='text-align:left'>"
            "<div style='width:{:.2f}em;height:.7em;background:#1460bc'></div></td></tr>"
        ).format(printable(name), weight, interval, max(0.0, min(1.0, run.average[name])) * _BAR)
        for name, weight, interval in _rows(run, account)
    )
    head = Markup("<tr><th style='text-align:left'>{}</th><th>weight</th><th>95% interval</th><th></th></tr>").format(
        account.labels.upper
    )
    lines = Markup("").join(Markup("<div>{}</div>").format(printable(line)) for line in _sentences(run, account))
    return str(Markup("<div><table>{}{}</table>{}</div>").format(head, rows, lines))


def _rows(run: SavedRun, account: Account) -> list[tuple[str, str, str]]:
    ranked = sorted(run.average, key=lambda name: -run.average[name])
    spans = {name: f"{low:.3f} to {high:.3f}" for name, (low, high) in account.intervals.items()}
    return [(name, f"{run.average[name]:.3f}", spans.get(name, "unknown")) for name in ranked]


def _sentences(run: SavedRun, account: Account) -> list[str]:
    said = [f"- {finding.sentence}" for finding in account.findings]
    said += [f"→ {account.verdict.sentence('`.extend()`')}"] if account.verdict is not None else []
    return [*said, f"{run.state}, in {run.path}"]
