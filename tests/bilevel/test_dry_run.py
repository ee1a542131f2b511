"""A dry run says what a run would do, finds what is wrong with it, and writes nothing."""

from pathlib import Path

import pytest
from rich.console import Console

from bilevel.config import Config, load_config
from bilevel.dry_run import STEPS, rehearse
from bilevel.errors import InputError
from bilevel.plugins import Plugins

RECIPE = """
problem: {name: quadratic, m: 2, n: 3}
solver: {name: scalebio, warmup: 0}
backend: {name: torch, device: cpu}
run: {steps: 50, output: out, checkpoint_every: 10}
"""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def config(plugins: Plugins, *changes: str) -> Config:
    return load_config(Path("recipe.yaml"), plugins, changes=changes)


def words(plugins: Plugins, *changes: str, resume: bool = False) -> str:
    console = Console(width=200)
    with console.capture() as shown:
        console.print(rehearse(config(plugins, *changes), resume=resume))
    return shown.get()


def test_it_says_steps_time_memory_and_what_is_written_and_writes_nothing(files: Path, plugins: Plugins) -> None:
    said = words(plugins)
    assert "a run would take 50 steps\n" in said
    assert "time: about" in said
    assert "GB of memory of this process" in said
    assert "written to out: recipe, records and results; a checkpoint every 10 steps, at the end and when" in said
    assert [path.name for path in files.iterdir()] == ["recipe.yaml"]


def test_it_does_not_tell_the_time_by_the_steps_of_a_warm_up(files: Path, plugins: Plugins) -> None:
    assert "time: not known" in words(plugins, f"solver.warmup={STEPS + 1}")


def test_it_is_refused_as_the_run_would_be_and_a_resumed_run_is_left_alone(files: Path, plugins: Plugins) -> None:
    config(plugins, "run.steps=2").fit()
    before = {path: path.stat().st_mtime_ns for path in (files / "out").rglob("*")}
    with pytest.raises(InputError, match="holds another run"):
        words(plugins)
    with pytest.raises(InputError, match="solver.penalty was"):
        words(plugins, "solver.penalty=7", resume=True)
    assert "a run would take 48 steps, from step 2\n" in words(plugins, resume=True)
    assert "has done all of its 2 steps" in words(plugins, "run.steps=2", resume=True)
    assert {path: path.stat().st_mtime_ns for path in (files / "out").rglob("*")} == before
