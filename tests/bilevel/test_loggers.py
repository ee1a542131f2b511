import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bilevel import SGD, Labels, Record, Run, ScaleBiO, fit
from bilevel.account import Account
from bilevel.history import History
from bilevel.loggers.plot import draw
from bilevel.loggers.progress import FIRST, ProgressLogger, bars, expectation, headline
from bilevel.palette import ACCENT
from bilevel.plugins import Plugins
from bilevel.record import pace
from bilevel.terminal import Terminal
from bilevel_backends.torch_backend import TorchBackend
from tests.conftest import Distance

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"  # the cursor


class Both:
    """Passes the calls on to a logger, as the plugin manager does: with the arguments that each hook asks for."""

    def __init__(self, logger: ProgressLogger) -> None:
        self.logger = logger

    def bilevel_run_start(self, *, run: Any) -> None:
        self.logger.bilevel_run_start(run)

    def bilevel_step_end(self, *, run: Any, record: Any) -> None:
        self.logger.bilevel_step_end(run, record)

    def bilevel_run_end(self, *, run: Any, error: Any) -> None:
        self.logger.bilevel_run_end(run, error)


def shown(terminal: bool) -> str:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=100, color_system=None)
    solver = ScaleBiO(penalty=5.0, lr_x=0.04, lr_z=0.3, optimizer_x=SGD(), optimizer_z=SGD(), warmup=2)
    fit(Distance(), solver, TorchBackend(device="cpu"), steps=5, observer=Both(ProgressLogger(console)))
    return screen.getvalue()


def test_a_terminal_gets_a_panel_with_bars_and_time_left() -> None:
    text = shown(terminal=True)
    assert "5/5" in text
    assert "left" in text
    assert "━" in text
    assert "x0" in text
    assert "gap" in text


@pytest.mark.parametrize("colours", [None, "truecolor"])
def test_bars_have_the_colour_of_charts_where_the_terminal_has_colours(colours: str | None) -> None:
    screen = io.StringIO()
    console = Terminal(file=screen, force_terminal=True, width=100, color_system=colours)
    console.print(bars({"a": 1.0, "b": 0.5}))
    accent = ";".join(str(int(ACCENT[0][place : place + 2], 16)) for place in (1, 3, 5))
    assert re.findall(r"\x1b\[38;2;([\d;]+)m━", screen.getvalue())[:2] == ([accent] * 2 if colours else [])
    assert screen.getvalue().count("━" * 16) >= 2
    assert ("\x1b" in screen.getvalue()) == (colours is not None)


def test_other_outputs_get_one_plain_line_a_step() -> None:
    lines = shown(terminal=False).splitlines()
    assert lines[0] == "5 steps"
    assert [line.split()[1] for line in lines[1:6]] == ["1/5", "2/5", "3/5", "4/5", "5/5"]
    assert "upper variable held" in lines[2]
    assert "penalty 5" in lines[3]
    assert "0:00:00 left" in lines[5]


def test_the_time_left_is_not_told_from_the_cheaper_steps_of_the_warm_up() -> None:
    cheap = [Record(t, 1.0, {"a": 1.0}, moved=False) for t in range(10)]
    dear = [Record(t, 3.0, {"a": 1.0}) for t in range(10, 14)]
    assert pace(cheap) is None
    assert pace([*cheap, *dear]) == 3.0
    assert "known after the warm-up" in shown(terminal=False).splitlines()[1]


@pytest.mark.parametrize(
    ("history", "recipe", "said"),
    [
        ([9.0] + [3.0] * FIRST, {}, "409 steps: about 20 minutes more, by the pace of 8 steps"),
        ([9.0] + [3.0] * (FIRST + 1), {}, ""),
        ([-1.0] * 5 + [9.0] + [3.0] * FIRST, {}, "409 steps: about 20 minutes more, by the pace of 8 steps"),
        (
            [9.0] + [3.0] * FIRST,
            {"run": {"steps": "auto"}},
            "at most 409 steps: about 20 minutes more, by the pace of 8 steps, less if the result is good enough before",
        ),
    ],
    ids=["first steps", "said once", "after a warm-up", "auto"],
)
def test_how_long_a_run_takes_is_said_once_it_can_be_told(history: list[float], recipe: Any, said: str) -> None:
    """Seconds of each step; negative: a cheaper one of a warm-up."""
    assert expected([Record(t, abs(s), {"a": 1.0}, moved=s > 0) for t, s in enumerate(history)], recipe) == said


def test_steps_that_evaluate_are_counted_by_their_share() -> None:
    seconds = [12.0 if t % 10 == 0 else 2.0 for t in range(12)]
    records = [Record(t, s, {}, metrics={"upper_loss": 1.0} if s > 2 else {}) for t, s in enumerate(seconds)]
    said = [expected(records[:done], {}) for done in range(1, 13)]
    assert [place for place, words in enumerate(said) if words] == [10]
    assert said[10] == "409 steps: about 20 minutes more, by the pace of 10 steps"  # of 3 seconds


def expected(records: list[Record], recipe: Any) -> str:
    parts: Any = (None, None, None, None)
    return expectation(Run(*parts, 409, 0, None, recipe, history=History(records)))


@pytest.mark.parametrize("broken", ["artifacts", "report"])
def test_the_terminal_is_as_before_whatever_fails_at_the_end(tmp_path: Path, plugins: Plugins, broken: str) -> None:
    class Failing(Distance):
        pass

    def fail(*arguments: Any) -> Any:
        raise OSError(28, "No space left on device")

    setattr(Failing, broken, fail)
    screen = io.StringIO()
    logger = ProgressLogger(Console(file=screen, force_terminal=True, width=100))
    plugins.manager.unregister(name="bilevel_progress")
    plugins.manager.register(logger)
    with pytest.raises(OSError, match="No space"):
        fit(
            Failing(),
            ScaleBiO(lr_x=0.04, lr_z=0.3),
            TorchBackend(device="cpu"),
            steps=2,
            output=tmp_path / "run",
            observer=plugins.hooks,
        )
    assert screen.getvalue().count(HIDE) == screen.getvalue().count(SHOW) == 1


def test_a_run_that_cannot_write_pictures_and_events_goes_on(
    tmp_path: Path, plugins: Plugins, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, *arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bilevel.loggers.plot.write_atomic", full)
    monkeypatch.setattr("bilevel.loggers.tensorboard.append_whole", full)
    fit(
        Distance(),
        ScaleBiO(lr_x=0.04, lr_z=0.3),
        TorchBackend(device="cpu"),
        steps=2,
        output=tmp_path / "run",
        observer=plugins.hooks,
    )
    said = [record.getMessage() for record in caplog.records]
    assert "no more TensorBoard events are written: No space left on device" in said
    assert any("weights.png is not drawn: No space left on device" in words for words in said)


def test_tensorboard_reads_the_events_back(tmp_path: Path, plugins: Plugins) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = fit(
        Distance(),
        ScaleBiO(lr_x=0.04, lr_z=0.3),
        TorchBackend(device="cpu"),
        steps=2,
        output=tmp_path / "run",
        observer=plugins.hooks,
    )
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("upper/x0")] == pytest.approx([r.upper["x0"] for r in result.history])


def test_losses_and_throughput_are_called_what_the_problem_calls_them() -> None:
    record = Record(0, 0.5, {}, metrics={"lower_loss": 2.0}, size=100)
    assert headline(record, Labels()) == "lower loss 2  200 rows/s  0.50 s/step"
    assert (
        headline(record, Labels(unit="tokens", lower_loss="training loss")) == "training loss 2  200 tokens/s  0.50 s/step"
    )


@pytest.mark.parametrize("warmup", [0, 3, 6])  # none, some, all of the steps
def test_the_picture_is_drawn_whatever_part_of_the_run_was_warm_up(warmup: int) -> None:
    solver = ScaleBiO(penalty=5.0, lr_x=0.04, lr_z=0.3, optimizer_x=SGD(), optimizer_z=SGD(), warmup=warmup)
    history = fit(Distance(), solver, TorchBackend(device="cpu"), steps=6).history
    assert draw(history, Account(6, 0, {})).startswith(b"\x89PNG")
