"""Checkpoints that are written while the next steps are taken."""

import json
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bilevel import AdamW, Interrupted, NonFiniteError, ScaleBiO, fit
from bilevel.run import Run
from bilevel_backends.torch_backend import TorchBackend
from tests.conftest import Distance

SOLVER = ScaleBiO(penalty=5.0, lr_x=0.1, lr_z=0.2, optimizer_x=AdamW(), optimizer_z=AdamW(), warmup=1)


class Slow(TorchBackend):
    """`before` is called before the files of a checkpoint are written, with the number of the checkpoint."""

    def __init__(self, before: Callable[[int], None] = lambda number: None, **settings: Any) -> None:
        super().__init__(device="cpu", **settings)
        self.before, self.copies = before, []  # type: ignore[var-annotated]

    def save(self, directory, variables, *, copy):  # type: ignore[no-untyped-def]
        write, number = super().save(directory, variables, copy=copy), len(self.copies)
        self.copies.append(copy)
        return lambda: (self.before(number), write())[1]


class At:
    """Observes the steps."""

    def __init__(self, step: Callable[[int], None]) -> None:
        self.step = step

    def bilevel_run_start(self, *, run: Run) -> None: ...

    def bilevel_step_end(self, *, run: Run, record: Any) -> None:
        self.step(record.step)

    def bilevel_run_end(self, *, run: Run, error: BaseException | None) -> None: ...


def run(output: Path, backend: TorchBackend, step: Callable[[int], Any] = lambda t: None, **options: Any) -> torch.Tensor:
    fields = {"steps": 12, "checkpoint_every": 4, "keep_checkpoints": 9, "seed": 1, "recipe": {}, **options}
    return fit(Distance(noise=0.3), SOLVER, backend, output=output, observer=At(step), **fields).x["value"]


def saved(output: Path) -> list[int]:
    """The steps of the checkpoints; nothing else may be beside them."""
    return sorted(int(path.name.removeprefix("step-")) for path in (output / "checkpoints").iterdir())


def content(output: Path, steps: int) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (output / "checkpoints" / f"step-{steps:08d}").glob("*[!n]")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_written_while_the_next_steps_run_is_the_state_of_its_step(tmp_path: Path, dtype: str) -> None:
    opened, complete = threading.Event(), []

    def step(t: int) -> None:
        if t == 6:
            complete.extend((tmp_path / "late").glob("checkpoints/step-*"))
            opened.set()

    whole = run(tmp_path / "whole", TorchBackend(device="cpu", dtype=dtype), checkpoint_in_background=False)  # type: ignore[arg-type]
    late = Slow(lambda number: None if opened.wait(30) else pytest.fail("no step is taken meanwhile"), dtype=dtype)
    assert torch.equal(run(tmp_path / "late", late, step), whole)
    assert late.copies == [True, True, False], "the last one is not copied"
    assert complete == [], "it was written before the steps"
    for steps in (4, 8, 12):
        files = content(tmp_path / "whole", steps)
        assert {name for name in files if name.endswith(".safetensors")}
        assert {name: data for name, data in content(tmp_path / "late", steps).items() if name in files} == files
    for steps in (8, 12):
        shutil.rmtree(tmp_path / "late" / "checkpoints" / f"step-{steps:08d}")
    assert torch.equal(run(tmp_path / "late", TorchBackend(device="cpu", dtype=dtype), resume=True), whole)  # type: ignore[arg-type]


def test_a_checkpoint_that_comes_due_waits_for_the_one_before_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    waiting = threading.Event()

    def say(words: str) -> None:
        said.append(words)
        waiting.set()

    def wait(number: int) -> None:
        if number < 2:  # nothing waits for the last one
            assert waiting.wait(30)
            waiting.clear()

    monkeypatch.setattr("bilevel.checkpoint_writer.PATIENCE", 0.0)
    monkeypatch.setattr("bilevel.checkpoint_writer.log", SimpleNamespace(info=say))
    run(tmp_path, Slow(wait), steps=3, checkpoint_every=1)
    assert said == [f"waiting for the checkpoint after {n} steps to be written" for n in (1, 2)]
    assert saved(tmp_path) == [1, 2, 3]


def test_what_fails_in_the_background_ends_the_run_and_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    threads: list[threading.Thread] = []
    begun = threading.Event()

    def full(number: int) -> None:
        if number == 1:
            threads.append(threading.current_thread())
            begun.set()
            raise OSError(28, "No space left on device", "z-00001-of-00001.safetensors")

    def step(t: int) -> None:
        last.append(t)
        if t == 8:
            assert begun.wait(30)
            threads[0].join()

    last: list[int] = []
    with pytest.raises(OSError, match=r"No space left on device: 'z-00001-of-00001\.safetensors'"):
        run(tmp_path, Slow(full), step)
    assert 7 <= last[-1] <= 8, "it goes on although it knows"
    assert saved(tmp_path) == [4]
    run(tmp_path, TorchBackend(device="cpu"), resume=True)
    assert saved(tmp_path) == [4, 8, 12]


@pytest.mark.parametrize(
    ("error", "left"),
    [(ZeroDivisionError(), [4]), (NonFiniteError("nan"), [4]), (KeyboardInterrupt(), []), (SystemExit(1), [])],
)
def test_a_run_that_ends_by_an_error_completes_its_checkpoint_unless_it_is_to_stop_at_once(
    tmp_path: Path, error: BaseException, left: list[int]
) -> None:
    failing = threading.Event()

    def fail(t: int) -> None:
        if t == 4:
            if left:
                failing.set()
            raise error

    with pytest.raises(type(error)):
        run(tmp_path, Slow(lambda number: None if failing.wait(30) else pytest.fail("no step is taken meanwhile")), fail)
    assert saved(tmp_path) == left
    failing.set()


@pytest.mark.parametrize("background", [True, False])
def test_a_signal_at_a_step_with_a_checkpoint_does_not_ask_for_another(tmp_path: Path, background: bool) -> None:
    def ask(t: int) -> None:
        if t == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    backend = Slow(lambda number: time.sleep(0.02))
    with pytest.raises(Interrupted, match="after 4 of 12 steps; a checkpoint is in"):
        run(tmp_path, backend, ask, checkpoint_in_background=background)
    assert saved(tmp_path) == [4]
    assert backend.copies == [background]


def test_where_memory_is_short_training_waits_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("bilevel.checkpoint_writer.free_memory", lambda: 1_999)
    monkeypatch.setattr(TorchBackend, "checkpoint_bytes", lambda self, variables: 1_000)
    backend = Slow()
    with caplog.at_level(logging.INFO):
        run(tmp_path, backend)
    assert backend.copies == [False, False, False]
    (said,) = [record.getMessage() for record in caplog.records]
    assert "training will wait while checkpoints are written: a copy takes 1.0 kB of memory, and 2.0 kB of " in said


def test_metrics_that_grow_while_a_checkpoint_is_written_are_none_of_its_business(tmp_path: Path) -> None:
    """Its hash is that of the lines of its own steps."""
    run(tmp_path, Slow(lambda number: time.sleep(0.02)), steps=9)
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000009")
    run(tmp_path, TorchBackend(device="cpu"), steps=9, resume=True)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(9))
