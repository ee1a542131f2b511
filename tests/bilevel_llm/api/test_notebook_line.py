"""What a notebook shows while something is worked on."""

import sys
from types import ModuleType
from typing import Any

import pytest

from bilevel import terminal
from bilevel.terminal import NotebookLine


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What IPython was asked to show, in a place of its own."""
    lines: list[str] = []

    class Handle:
        def update(self, line: str) -> None:
            lines.append(line)

    def display(line: str, display_id: bool) -> Any:
        assert display_id
        lines.append(line)
        return Handle()

    module = ModuleType("IPython.display")
    module.HTML, module.display = str, display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setattr(terminal, "in_notebook", lambda: True)
    monkeypatch.setattr(terminal, "REFRESH", 0.0)
    return lines


def test_a_line_is_replaced_and_removed_at_the_end(shown: list[str]) -> None:
    with NotebookLine() as line:
        line.say("reading <b>")
        line.say("tokenizing")
    assert shown == ["<small>reading &lt;b&gt;</small>", "<small>tokenizing</small>", ""]


def test_words_that_follow_too_fast_are_left_out(shown: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "REFRESH", 60.0)
    with NotebookLine() as line:
        for i in range(100):
            line.say(str(i))
    assert shown == ["<small>0</small>", ""]


def test_elsewhere_nothing_is_shown(shown: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "in_notebook", lambda: False)
    with NotebookLine() as line:
        line.say("tokenizing")
    assert shown == []


def test_tokenizing_and_looking_for_a_step_size_are_told_of(
    shown: list[str], model_directory: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.bilevel_llm.api.test_reweight import reweight

    monkeypatch.setattr("bilevel.loggers.notebook.in_notebook", lambda: False)
    reweight(model_directory(), output=tmp_path / "run", lr="auto")
    assert any("tokenizing: " in line for line in shown)
    tried = [line for line in shown if "step size" in line]
    assert "how the loss varies by itself" in tried[0]
    assert "trying 3e-06" in tried[6]
    assert shown[-1] == ""
