"""The terminal: what is printed is text, whatever names it contains."""

from __future__ import annotations

import sys
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


def in_notebook() -> bool:
    """Whether a notebook shows what is printed: output that can be replaced, but no terminal."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


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
