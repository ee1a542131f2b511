"""The terminal: what is printed is text, whatever names it contains."""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text
from rich.theme import Theme

from bilevel.palette import ACCENT
from bilevel.plaintext import escape

# Live bars, by the names that rich has for their parts; a bar that is full looks like the others.
BARS = Theme({"bar.complete": ACCENT[0], "bar.finished": ACCENT[0], "bar.pulse": ACCENT[0]})

REFRESH = 0.5  # seconds between two updates of what a notebook shows; each is a message to the browser


def in_notebook() -> bool:
    """Whether a notebook shows what is printed: output that can be replaced, but no terminal."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


class NotebookLine:
    """A line below the cell of a notebook, while something is worked on: it is replaced, and removed at the end.

    Outside of notebooks nothing is shown.
    """

    def __init__(self) -> None:
        self._shown: Any = None
        self._said = 0.0

    def __enter__(self) -> NotebookLine:
        return self

    def say(self, words: str) -> None:
        """Show what is being done. Words that follow each other too fast to be read are left out."""
        if not in_notebook() or time.monotonic() - self._said < REFRESH:
            return
        from IPython.display import HTML, display

        line, self._said = HTML(f"<small>{html.escape(escape(words))}</small>"), time.monotonic()
        if self._shown is None:
            self._shown = display(line, display_id=True)
        else:
            self._shown.update(line)

    def __exit__(self, *_: object) -> None:
        if self._shown is not None:
            from IPython.display import HTML

            self._shown.update(HTML(""))
            self._shown = None


class Terminal(Console):
    """A console to which nothing is markup, an emoji code or a command: what looks like one is shown as it is written."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, theme=BARS, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """The string as text; escaped before its width is measured."""
        return super().render_str(escape(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The segments of anything that rich renders; control codes are those of rich alone."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(escape(segment.text), segment.style)
