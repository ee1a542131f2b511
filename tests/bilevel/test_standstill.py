"""A run whose step sizes are too small to matter says so at the end; a run that converges, or wanders, does not."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import F2SA, Descent, Problem, ScaleBiO, Solver, fit
from bilevel.standstill import stood_still
from bilevel_backends.torch_backend import TorchBackend
from bilevel_problems.quadratic import Quadratic
from bilevel_problems.ridge_reweighting import RidgeReweighting
from tests.bilevel.solvers.grid import CASES, Case, grid, small


def said(caplog: pytest.LogCaptureFixture, problem: Problem[Any], solver: Solver[Any], steps: int, seed: int = 0) -> str:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "bilevel"):
        fit(problem, solver, TorchBackend(), steps=steps, seed=seed)
    return caplog.text


@pytest.mark.parametrize("problem", [small, lambda: RidgeReweighting(rows=20, d=4)], ids=["quadratic", "ridge"])
def test_the_defaults_for_language_models_say_what_to_raise_on_a_toy(
    problem: Callable[[], Problem[Any]], caplog: pytest.LogCaptureFixture
) -> None:
    text = said(caplog, problem(), ScaleBiO(), steps=40)
    assert "hardly moved in 40 steps" in text
    assert "z by 0.0004 an entry with lr_z = 1e-05. Raise lr_z, ten times at first" in text


@grid(without=lambda case: case.known.repeats)
def test_a_run_that_converges_says_nothing(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    assert not said(caplog, small(), dataclasses.replace(case.solver, lr_x=case.known.lr_x), steps=40)


@pytest.mark.parametrize("dimensions", [1, 2])
def test_noise_at_the_solution_is_no_standstill(dimensions: int, caplog: pytest.LogCaptureFixture) -> None:
    """Steps so small that x and y never leave it, which in one dimension is nearly a straight line now and then."""
    forms = Quadratic(m=dimensions, n=dimensions, kappa=1.0).forms
    zero = torch.zeros(dimensions, dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(lambda x: forms.expansion(x)[0], zero)
    x = torch.linalg.solve(hessian, -forms.grad_phi(zero))
    problem = Quadratic.of(forms, x=x, y=forms.lower_solution(x), upper_noise=1.0, lower_noise=1.0)
    for seed in range(3):
        assert not said(caplog, problem, F2SA(lr_x=1e-5, lr_z=1e-4), steps=32, seed=seed)


@pytest.mark.parametrize(("solver", "steps"), [(Descent(lr=1e-9), 12), (CASES["f2sa"].solver, 3)], ids=["short", "shorter"])
def test_a_run_of_a_few_steps_is_not_judged(solver: Any, steps: int, caplog: pytest.LogCaptureFixture) -> None:
    assert not said(caplog, small(), solver, steps)


def path(*pieces: float) -> list[Tensor]:
    return list(torch.tensor([0.0, *pieces], dtype=torch.float64).cumsum(0)[:, None])


PATHS: dict[str, tuple[list[Tensor], float | None]] = {
    "straight and steady": (path(*[1e-4] * 8), 8e-4),
    "held at first": (path(0, 0, 0, *[1e-4] * 5), 5e-4),
    "held for most of it": (path(*[0] * 5, 1e-4, 1e-4, 1e-4), None),
    "slowing down": (path(*(1e-4 * 0.95**k for k in range(8))), None),
    "uneven": (path(1e-4, 4e-4, 4e-4, 1e-4, 3e-4, 1e-4, 1e-4, 2e-4), None),
    "far": (path(*[1e-2] * 8), None),
    "back and forth": (path(*[1e-4, -1e-4] * 4), None),
    "never moved": (path(*[0.0] * 8), None),
    "not finite": (path(*[1e-4] * 7, float("nan")), None),
}


@pytest.mark.parametrize(("points", "moved"), PATHS.values(), ids=PATHS)
def test_only_a_short_straight_and_steady_path_is_a_standstill(points: list[Tensor], moved: float | None) -> None:
    assert stood_still(points) == (None if moved is None else pytest.approx(moved))
