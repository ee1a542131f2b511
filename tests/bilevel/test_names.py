"""Names are text wherever they are shown: no markup, no emoji codes, no formulas, no commands to the terminal."""

import io
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from bilevel.account import Account
from bilevel.loggers.plot import draw
from bilevel.loggers.progress import bars
from bilevel.plaintext import escape, on_one_line
from bilevel.record import Record
from bilevel.report.drawing import Chart, Label
from bilevel.report.page import html, read
from bilevel.terminal import Terminal

NAMES = [
    "[web]",
    "books [en]",
    "[/x]",
    "[bold red]b[/]",
    r"a\[b]",
    "$\\frac{$",
    "$x$ $y$",
    ":smile:",
    "_hidden",
    "<b>&amp;</b>",
    "{{7*7}}",
]
HOSTILE = "a\x1b[31mb\x9b\u202ec\u2028d"


def shown(*renderables: object) -> str:
    stream = io.StringIO()
    terminal = Terminal(file=stream, width=200, force_terminal=True, color_system=None)
    for one in renderables:
        terminal.print(one)
    return stream.getvalue()


@pytest.mark.parametrize("name", NAMES)
def test_the_terminal_shows_a_name_as_it_is_written(name: str) -> None:
    from rich.text import Text

    for output in (shown(name), shown(Text(name)), shown(bars({name: 0.5}))):
        assert name in output


def test_no_command_reaches_the_terminal() -> None:
    from rich.text import Text

    for output in (shown(HOSTILE), shown(Text(HOSTILE)), shown(bars({HOSTILE: 0.5}))):
        assert not any(command in output for command in ("\x1b", "\x9b", "\u202e", "\u2028"))
        assert "\\x1b[31mb\\x9b\\u202ec\\u2028d" in output


def test_what_is_no_command_stays_as_it_is() -> None:
    for text in ("line\nline\ttab", "naïve 日本 😀", "می‌خواهم"):
        assert escape(text) == text
    assert on_one_line("a\nb") == r"a\nb"


def test_a_long_name_leaves_room_in_a_picture() -> None:
    assert on_one_line("a" * 300 + "b" * 300) == "a" * 30 + "…" + "b" * 30
    name = "x" * 300
    assert draw(
        [Record(step, 0.1, {name: 0.4, "y": 0.6}, True, {"lower_loss": 1.0}) for step in range(3)], Account(3, 0, {})
    ).startswith(b"\x89PNG")


@pytest.mark.parametrize("name", [*NAMES, HOSTILE, "two\nlines"])
def test_pictures_draw_a_name_as_it_is_written(name: str) -> None:
    history = [Record(step, 0.1, {name: 0.4, "other": 0.6}) for step in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a font may lack a character
        assert draw(history, Account(3, 0, {})).startswith(b"\x89PNG")
        chart = Chart("c", name, "", lambda axes: [Label(name, 0.5, "black")])
        assert chart.png().startswith(b"\x89PNG")
        chart.svg("p")


@pytest.mark.parametrize("name", ["<b>bold</b>", "a\x1b[31mb"])
def test_a_page_shows_a_name_as_it_is_written(make_run: Callable[..., Path], name: str) -> None:
    from markupsafe import escape as as_html

    page = html(read([make_run(final={name: 0.7, "other": 0.3})]))
    assert str(as_html(escape(name))) in page
    assert "<b>bold</b>" not in page
    assert "\x1b" not in page
