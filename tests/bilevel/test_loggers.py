import io
from typing import Any

import pytest
from rich.console import Console

from bilevel import SGD, Labels, Record, ScaleBiO, fit
from bilevel.loggers.plot import draw
from bilevel.loggers.progress import ProgressLogger, headline
from bilevel_backends.torch_backend import TorchBackend
from tests.conftest import Distance


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


def test_other_outputs_get_one_plain_line_a_step() -> None:
    lines = shown(terminal=False).splitlines()
    assert lines[0] == "5 steps"
    assert [line.split()[1] for line in lines[1:6]] == ["1/5", "2/5", "3/5", "4/5", "5/5"]
    assert "upper variable held" in lines[2]
    assert "penalty 5" in lines[3]
    assert "0:00:00 left" in lines[5]


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
    assert draw(history, Labels()).startswith(b"\x89PNG")
