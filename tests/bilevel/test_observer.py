"""Loggers follow a run, and neither fail it nor hold it up."""

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bilevel import InputError, Logger, NonFiniteError, ScaleBiO, fit, hookimpl
from bilevel.errors import ProblemError
from bilevel_backends.torch_backend import TorchBackend
from tests.conftest import Distance


@dataclass(frozen=True)
class Told(Logger):
    """Writes down what it is told; may fail at an event, or take long."""

    fails_at: str = ""
    seconds: float = 0.0
    events: list[Any] = field(default_factory=list)

    def note(self, event: str, fact: Any) -> None:
        time.sleep(self.seconds)
        self.events.append((event, fact))
        if event == self.fails_at:
            raise ConnectionError("the server is down\nand this is a second line")

    @hookimpl
    def bilevel_run_start(self, run: Any) -> None:
        self.note("start", run.start)

    @hookimpl
    def bilevel_step_end(self, record: Any) -> None:
        self.note("step", record.step)

    @hookimpl
    def bilevel_run_end(self, error: Any) -> None:
        self.note("end", error)


def run(loggers: Sequence[Logger], steps: int = 3, **fields: Any) -> Any:
    solver = fields.pop("solver", ScaleBiO(lr_x=0.04, lr_z=0.3))
    return fit(Distance(), solver, TorchBackend(device="cpu"), steps=steps, loggers=loggers, **fields)


def test_a_logger_is_told_everything_in_order() -> None:
    run([told := Told()])
    assert told.events == [("start", 0), ("step", 0), ("step", 1), ("step", 2), ("end", None)]


def test_a_run_that_fails_is_told_as_one() -> None:
    with pytest.raises(NonFiniteError) as caught:
        run([told := Told()], steps=200, solver=ScaleBiO(lr_x=0.04, lr_z=1e200))
    assert told.events[-1] == ("end", caught.value)


@pytest.mark.parametrize("event", ["start", "step", "end"])
def test_a_logger_that_breaks_is_one_warning_and_the_run_goes_on(event: str, caplog: pytest.LogCaptureFixture) -> None:
    broken, other = Told(fails_at=event), Told()
    result = run([broken, other])
    assert len(result.history) == 3
    assert len(other.events) == 5
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert said == ["Told logs no more of this run: ConnectionError: the server is down"]


def test_a_logger_that_broke_is_told_only_the_end_so_that_it_can_close_what_it_holds() -> None:
    run([told := Told(fails_at="step")])
    assert [event for event, _ in told.events] == ["start", "step", "end"]


def test_steps_do_not_wait_for_a_logger() -> None:
    slow = Told(seconds=0.2)
    seen: list[int] = []

    class Watch:
        def bilevel_run_start(self, *, run: Any) -> None: ...

        def bilevel_step_end(self, *, run: Any, record: Any) -> None:
            seen.append(len(slow.events))

        def bilevel_run_end(self, *, run: Any, error: Any) -> None: ...

    run([slow], steps=4, observer=Watch())
    assert seen[-1] < 4  # all steps were done before it was told of them
    assert len(slow.events) == 6  # and the end waited for it


def test_the_end_of_a_run_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("bilevel.observer.SILENT", 0.01)
    monkeypatch.setattr("bilevel.observer.PATIENCE", 0.02)
    released, gone = threading.Event(), threading.Event()

    @dataclass(frozen=True)
    class Stuck(Logger):
        @hookimpl
        def bilevel_step_end(self) -> None:
            released.wait(30)
            try:
                raise ConnectionError("the server is down")
            finally:
                gone.set()

    result = run([Stuck()])
    released.set()
    assert gone.wait(30)
    assert len(result.history) == 3
    (said,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert said.startswith("Stuck has not taken all of the run")


def test_every_run_has_a_follower_of_its_own() -> None:
    made: list[object] = []

    @dataclass(frozen=True)
    class Fresh(Logger):
        def follower(self) -> object:
            made.append(told := Told())
            return told

    logger = Fresh()
    run([logger])
    run([logger])
    told = [follower for follower in made if follower.events]  # type: ignore[attr-defined]
    assert [len(follower.events) for follower in told] == [5, 5]  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Misspelt(Logger):
    @hookimpl
    def bilevel_step_ends(self) -> None:
        """Not a hook."""


@dataclass(frozen=True)
class Asking(Logger):
    @hookimpl
    def bilevel_step_end(self, weights: Any) -> None:
        """Not an argument of the hook."""


@dataclass(frozen=True)
class Missing(Logger):
    requires = {"no_such_service": "my-package[service]"}  # noqa: RUF012


@pytest.mark.parametrize(
    ("logger", "error", "said"),
    [
        (Misspelt(), ProblemError, "unknown hook 'bilevel_step_ends'"),
        (Asking(), ProblemError, "weights"),
        (Missing(), InputError, r"^no_such_service is not installed: pip install 'my-package\[service\]'$"),
        ("wandb", ProblemError, "no bilevel.Logger"),
    ],
    ids=["misspelt", "argument", "missing", "name"],
)
def test_what_cannot_follow_a_run_is_an_error_before_anything_is_written(
    logger: Any, error: type[Exception], said: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=said):
        run([logger], output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_of_the_same_name_is_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "no_such_service").mkdir()  # W&B, for one, keeps its files in a folder that is called wandb
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError, match="no_such_service is not installed"):
        Missing().check()


def test_a_package_that_cannot_be_imported_is_said_to_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "no_such_service.py").write_text("import nothing_of_that_name")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError, match="installed, but cannot be imported.*nothing_of_that_name"):
        Missing().check()


def test_a_logger_that_was_told_no_beginning_is_told_no_end() -> None:
    class Failing:
        def bilevel_run_start(self, *, run: Any) -> None:
            raise OSError("no terminal")

        def bilevel_run_end(self, *, run: Any, error: Any) -> None: ...

    with pytest.raises(OSError, match="no terminal"):
        run([told := Told()], observer=Failing())
    assert told.events == []
