"""The step size of a baseline is the recipe's, and a model that has learned nothing is reported."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from bilevel import SGD, InputError
from bilevel.cli import app
from bilevel.optimizer import AdamW
from bilevel.record import Record
from bilevel.schedule import Cosine
from bilevel.solvers.descent import Descent
from bilevel.solvers.f2sa import F2SA
from bilevel.solvers.scalebio import ScaleBiO
from bilevel_llm.baselines.base import Task
from bilevel_llm.baselines.doremi import DoReMi
from bilevel_llm.baselines.learning import nothing_learned
from bilevel_llm.baselines.odm import ODM
from bilevel_llm.baselines.training import LR, lower_training

Make = Callable[..., Task]
METHODS = [DoReMi, ODM]


@pytest.mark.parametrize("method", METHODS)
def test_step_size_and_optimizer_are_those_of_the_recipe(method: type[DoReMi | ODM]) -> None:
    solver = ScaleBiO(lr_z=3e-4, optimizer_z=AdamW(betas=(0.8, 0.9), weight_decay=0.1))
    taken = method().completed(lambda: solver)
    assert taken.lr == 3e-4
    assert taken.optimizer == AdamW(betas=(0.8, 0.9), weight_decay=0.1, clip=1.0), "the recipe does not clip, the paper does"
    clipped = method().completed(lambda: ScaleBiO(optimizer_z=AdamW(clip=0.3)))
    assert clipped.optimizer == AdamW(clip=0.3)
    schedule = Cosine(1e-3, 10)
    assert method().completed(lambda: ScaleBiO(lr_z=schedule)).lr == schedule


@pytest.mark.parametrize("method", METHODS)
def test_its_own_keys_come_first_and_without_a_solver_there_is_a_default(method: type[DoReMi | ODM]) -> None:
    assert method(lr=0.5).completed(lambda: ScaleBiO(lr_z=3e-4)).lr == 0.5
    assert method(lr=0.5, optimizer=SGD()).completed(lambda: pytest.fail("the section is not needed")).lr == 0.5
    alone = method().completed(lambda: None)
    assert (alone.lr, alone.optimizer) == (LR, AdamW(clip=1.0))


@pytest.mark.parametrize("method", METHODS)
def test_a_step_size_is_not_taken_to_another_kind_of_optimizer(method: type[DoReMi | ODM]) -> None:
    with pytest.raises(InputError, match=r"optimizer is adamw.*is one of sgd.*set baseline\.lr too"):
        method(optimizer=AdamW()).completed(F2SA)
    assert method().completed(F2SA).optimizer == SGD(clip=1.0)
    assert method(optimizer=AdamW(), lr=1e-3).completed(F2SA).lr == 1e-3


def test_the_step_size_is_found_in_any_solver_that_has_one() -> None:
    found = lower_training(Descent(lr=7e-3))
    assert found is not None
    assert (found.lr, found.optimizer) == (7e-3, AdamW(clip=1.0))
    assert lower_training(DoReMi()) is None, "a solver that has not been given a step size"
    assert lower_training(None) is None


def test_the_proxy_follows_a_schedule_from_its_start(task: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[str, float]] = []
    t = task(steps=6)
    step = type(t.backend).step

    def watching(self: Any, variable: Any, *, lr: float) -> float:
        taken.append((variable.name, lr))
        return step(self, variable, lr=lr)

    monkeypatch.setattr(type(t.backend), "step", watching)
    DoReMi(lr=Cosine(1e-3, 6)).find(t)
    assert [name for name, _ in taken] == ["z"] * 3 + ["y"] * 3
    assert [lr for name, lr in taken if name == "z"] == [lr for name, lr in taken if name == "y"]


def run(*words: Any) -> None:
    app(["baseline", *map(str, words)], standalone_mode=False)


def read(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "weights.json").read_text())
    return found


@pytest.mark.parametrize("method", ["doremi", "odm"])
def test_the_command_takes_it_from_the_section_solver_and_keeps_it(method: str, recipe: Path, tmp_path: Path) -> None:
    """The recipe that is kept has no solver, and gives the same weights again."""
    run(method, recipe)
    found = read(tmp_path / "run")
    assert found["method"]["lr"] == 2e-3
    assert found["method"]["optimizer"]["weight_decay"] == 0.25
    kept = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert kept["baseline"]["lr"] == 2e-3
    run(method, tmp_path / "run" / "recipe.yaml", "--output", tmp_path / "again")
    assert read(tmp_path / "again")["sources"] == found["sources"]
    run(method, recipe, "--set", "baseline.lr=1e-3", "--output", tmp_path / "own")
    assert read(tmp_path / "own")["method"]["lr"] == 1e-3
    assert read(tmp_path / "own")["sources"] != found["sources"]


def test_a_solver_that_is_needed_and_wrong_is_reported(recipe: Path) -> None:
    with pytest.raises(InputError, match=r"unknown key solver\.lr_zz"):
        run("doremi", recipe, "--set", "solver.lr_zz=1")


def records(losses: np.ndarray) -> list[Record]:
    """Losses of shape (steps, sources), NaN where a step does not see the source."""
    return [
        Record(t, 0.1, {}, parts={"lower_parts": {str(i): value for i, value in enumerate(row) if np.isfinite(value)}})
        for t, row in enumerate(losses.tolist())
    ]


@pytest.mark.parametrize(("one_source_a_step", "steps"), [(False, 45), (True, 135)])
def test_how_often_it_errs(one_source_a_step: bool, steps: int) -> None:
    """Of 400 models that learn nothing, 2.5% should pass (10; 21 or more by chance in 0.1%), and nearly all that learn."""
    draw, passed, failed = np.random.default_rng(0), 0, 0
    levels = np.array([1.0, 3.0, 5.0])  # sources differ by far more than a step changes
    for _ in range(400):
        noise = levels + 0.3 * draw.standard_normal((steps, 3))
        falling = noise - 0.6 * (1 - np.exp(-3 * np.arange(steps) / steps))[:, None]
        if one_source_a_step:
            hidden = np.arange(3) != draw.integers(3, size=steps)[:, None]
            noise[hidden] = falling[hidden] = np.nan
        passed += not nothing_learned("m", "model", records(noise), "1e-5")
        failed += bool(nothing_learned("m", "model", records(falling), "1e-5"))
    assert passed < 21
    assert failed < 4


def test_each_way_of_not_learning_has_its_remedy() -> None:
    draw = np.random.default_rng(0)
    (flat,) = nothing_learned("odm", "model", records(1 + draw.random((30, 2))), "1e-05")
    assert flat.flagged
    assert "its step size of 1e-05 (baseline.lr" in flat.sentence
    assert "raise" in flat.sentence
    (worse,) = nothing_learned("odm", "model", records(np.arange(30)[:, None] + draw.random((30, 2))), "10")
    assert "rose by" in worse.sentence
    assert "lower its step size of 10" in worse.sentence
    (short,) = nothing_learned("odm", "model", records(draw.random((5, 2))), "1")
    assert "too few to tell" in short.sentence


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_stands_still_is_reported_and_one_that_learns_is_not(task: Make, method: type[DoReMi | ODM]) -> None:
    still = method(lr=1e-7).find(task(steps=36))
    assert {finding.name for finding in still.findings} == {"nothing-learned"}
    assert all(finding.flagged for finding in still.findings)
    assert not method(lr=3e-3).find(task(steps=36)).findings


def test_the_finding_is_written_with_the_weights(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("doremi", recipe, "--set", "baseline.lr=1e-7", "--set", "run.steps=16")
    findings = read(tmp_path / "run")["findings"]
    assert [(f["name"], f["flagged"]) for f in findings] == [("nothing-learned", True)] * 2 + [("note", False)]
    assert "its step size of 1e-07" in " ".join(capsys.readouterr().out.split())
