"""What must hold for every solver: on every problem, resumed, in micro-batches, with either optimizer, from a recipe."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from bilevel import LISA, SGD, AdamW, All, InputError, Problem, RunError, Shard, fit
from bilevel.config import load_config
from bilevel.plugins import Plugins
from bilevel.testing.session import configure
from bilevel_backends.torch_backend import TorchBackend
from bilevel_problems.cubic_bias import CubicBias
from bilevel_problems.hyper_cleaning import HyperCleaning
from bilevel_problems.logistic_regularization import LogisticRegularization
from bilevel_problems.quadratic import Quadratic
from bilevel_problems.ridge_reweighting import RidgeReweighting
from tests.bilevel.solvers.grid import CASES, SHARED, Case, grid, small

PROBLEMS: dict[str, Callable[[], Problem[Any]]] = {
    "quadratic": lambda: Quadratic(m=2, n=4, kappa=3.0),
    "quadratic, nonconvex": lambda: Quadratic(m=2, n=4, kappa=3.0, rho=0.3, start=0.5),
    "logistic-regularization": lambda: LogisticRegularization(rows=40, d=4, start=0.0),
    "ridge-reweighting": lambda: RidgeReweighting(rows=20, d=4),
    "hyper-cleaning": lambda: HyperCleaning(rows=80, validation_rows=40, ridge=0.1),
    "cubic-bias": lambda: CubicBias(mu=0.5, start=1.0),
}


def phi(problem: Problem[Any], x: dict[str, Tensor]) -> float:
    """Φ(x): the lower level solved with Newton's method by hand, gradients of both losses at all data."""
    upper, lower = problem.upper(), problem.lower()
    upper.load_state_dict(x)
    parameters = list(lower.parameters())
    optimizer = torch.optim.LBFGS(parameters, max_iter=300, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def total(loss: Callable[..., Any], batches: Any) -> Tensor:
        values = [loss(upper, lower, batch) for batch in batches]
        return sum((value[0] if isinstance(value, tuple) else value for value in values), torch.zeros(()))

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = total(problem.lower_loss, problem.lower_batch(0, Shard()))
        value.backward()
        return value

    optimizer.step(closure)
    return float(total(problem.upper_loss, problem.upper_batch(0, Shard())).detach())


@pytest.mark.parametrize(
    ("problem", "optimizer"),
    [*((problem, "sgd") for problem in PROBLEMS), ("quadratic, nonconvex", "adamw"), ("ridge-reweighting", "adamw")],
)
@grid(without=lambda case: case.known.repeats)
def test_every_solver_lowers_the_true_objective_of_every_problem(case: Case, problem: str, optimizer: str) -> None:
    """Few steps, so that the grid is quick; what first follows the lower level's cold start, as AdamW does, needs more."""
    built = PROBLEMS[problem]()
    built.prepare()
    settings: dict[str, Any] = {"lr_x": case.known.lr_x}
    if optimizer == "adamw":
        settings = {"optimizer_x": AdamW(), "optimizer_z": AdamW(), "lr_x": 0.02, "lr_z": 0.05, "lr_y": 0.05}
    names = {field.name for field in dataclasses.fields(case.solver)}
    solver = dataclasses.replace(case.solver, **{key: value for key, value in settings.items() if key in names})
    steps = max(case.known.steps, 50 if optimizer == "adamw" else 0)
    result = fit(built, solver, TorchBackend(), steps=steps)
    assert phi(built, dict(result.x)) < phi(built, built.upper().state_dict())


def with_adamw(case: Case) -> Any:
    settings = {**SHARED, **case.known.settings, "optimizer_x": SGD(momentum=0.5), "optimizer_z": AdamW(), "lr_z": 0.01}
    return configure(type(case.solver), **settings)


@grid()
def test_a_resumed_run_goes_on_bit_for_bit(case: Case, tmp_path: Path) -> None:
    """Noise, block sampling and optimizers with state; stopped within a period of the block draw and across one."""
    problem = small(split=4, upper_noise=0.2, lower_noise=0.2)
    active = LISA(blocks=2, period=3) if not case.second_order else All()

    def run(steps: int, output: str, *, resume: bool = False) -> Any:
        return fit(
            problem,
            with_adamw(case),
            TorchBackend(),
            steps=steps,
            seed=5,
            active=active,
            output=tmp_path / output,
            resume=resume,
        )

    whole = run(7, "whole")
    for steps in (2, 3, 7):
        parts = run(steps, "parts", resume=steps > 2)
    assert torch.equal(whole.x["value"], parts.x["value"])
    timeless = [[dataclasses.replace(record, seconds=0.0) for record in r.history] for r in (whole, parts)]
    assert timeless[0] == timeless[1]


@grid()
def test_the_result_does_not_depend_on_micro_batches(case: Case) -> None:
    """Sums in another order: rounding, times the penalty, over three steps."""
    problem = small(upper_noise=0.2, lower_noise=0.2, batch_size=4)
    one, many = (fit(problem, case.solver, TorchBackend(micro_batch_size=m), steps=3).x["value"] for m in (None, 1))
    assert not torch.equal(one, problem.start_x)
    torch.testing.assert_close(one, many, rtol=1e-11, atol=1e-12)


@grid()
def test_a_step_reports_losses_and_the_norm_of_the_gradient_of_x(case: Case) -> None:
    (record,) = fit(RidgeReweighting(rows=5, d=2), case.solver, TorchBackend(), steps=1).history
    assert {"upper_loss", "lower_loss", "grad_norm_x"} <= record.metrics.keys()
    assert {"lower_parts", "upper_parts"} <= record.parts.keys()
    if (
        len(case.solver.workload().replicas) > 1 and not case.second_order
    ):  # two lower variables, whose losses differ by the gap
        assert {"gap", "penalty"} <= record.metrics.keys()
        assert set(record.parts["gap_parts"]) == set(RidgeReweighting().names)


@pytest.mark.parametrize("name", sorted({case.registered for case in CASES.values()}))
def test_a_recipe_names_the_solver_and_changes_nothing_else(name: str, tmp_path: Path, plugins: Plugins) -> None:
    recipe = {
        "problem": {"name": "quadratic", "m": 2, "n": 4, "kappa": 3},
        "solver": {"name": name, "lr_x": 0.01, "lr_z": {"name": "power", "start": 0.3, "exponent": -0.5}},
        "backend": {"name": "torch"},
        "run": {"steps": 2, "output": str(tmp_path / "run")},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    result = load_config(file, plugins).fit()
    assert len(result.history) == 2
    with pytest.raises(InputError, match=r"unknown key solver\.lr_zz"):
        load_config(file, plugins, changes=["solver.lr_zz=1"])


@grid()
def test_iterates_that_blow_up_stop_the_run(case: Case) -> None:
    settings = {**SHARED, **case.known.settings, "lr_z": 1e200, "lr_x": 1e200}
    diverging = configure(type(case.solver), **settings)
    with pytest.raises(RunError, match=r"step \d: .*(finite|nan|inf|overflows)|not strongly convex"):
        fit(small(), diverging, TorchBackend(), steps=8)
