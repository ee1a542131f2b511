"""Constraints on x: every solver ends at the constrained solution, and says so by the gradient mapping."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bilevel import (
    AID,
    F2SA,
    AdamW,
    Box,
    Constraint,
    InputError,
    NonNegative,
    Problem,
    Rounds,
    Simplex,
    fit,
    fit_many,
)
from bilevel.constraint import mapping
from bilevel.testing.contract import ContractError, check_problem
from bilevel_backends.torch_backend import TorchBackend
from bilevel_problems.quadratic import Quadratic
from tests.bilevel.solvers.grid import Case, grid

TARGET = torch.tensor([1.5, 0.2, -0.7, 0.4], dtype=torch.float64)
ON_SIMPLEX = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)


@dataclasses.dataclass
class Near(Problem[None]):
    """f = ½‖y - t‖², g = ½‖y - x‖²: x* is the projection of t, whatever the penalty, as Φ and f + α(g - min g) agree up to
    a factor."""

    target: Tensor
    start: Tensor
    constraint: Any = None

    upper_data = lower_data = None

    def __post_init__(self) -> None:
        self.upper_constraint = self.constraint

    def upper(self) -> Tensor:
        return self.start

    def lower(self) -> Tensor:
        return torch.zeros_like(self.start)

    def upper_loss(self, x: Any, y: Any, batch: None) -> Tensor:
        return 0.5 * (y() - self.target).square().sum()

    def lower_loss(self, x: Any, y: Any, batch: None) -> Tensor:
        return 0.5 * (y() - x()).square().sum()


SETS = {
    "box": (Box(0.0, 1.0), torch.tensor([1.0, 0.2, 0.0, 0.4], dtype=torch.float64)),
    "box of tensors": (
        Box(torch.tensor([0, 0, -9, 0.5]), torch.tensor([2, 0.1, 9, 1])),
        torch.tensor([1.5, 0.1, -0.7, 0.5]),
    ),
    "non-negative": (NonNegative(), torch.tensor([1.5, 0.2, 0.0, 0.4], dtype=torch.float64)),
    "simplex": (Simplex(), ON_SIMPLEX),
    "larger simplex": (Simplex(1.8), torch.tensor([1.4, 0.1, 0.0, 0.3], dtype=torch.float64)),
}


@pytest.mark.parametrize("name", SETS)
def test_the_projection_of_a_target_is_the_solution(name: str) -> None:
    constraint, solution = SETS[name]
    problem = Near(TARGET, constraint.project(torch.full((4,), 0.25, dtype=torch.float64)), constraint)
    result = fit(problem, AID(lr_x=0.5, lr_z=1.0, lower_steps=1), TorchBackend(), steps=30)
    torch.testing.assert_close(result.x["value"], solution.double(), rtol=0, atol=1e-7)
    assert result.history[-1].metrics["grad_norm_x"] == pytest.approx(0.0, abs=1e-7)


@grid(without=lambda case: case.known.repeats)
@pytest.mark.parametrize("name", ["box", "simplex"])
def test_every_solver_ends_at_the_constrained_solution(case: Case, name: str) -> None:
    constraint, solution = SETS[name]
    problem = Near(TARGET, torch.tensor([0.97, 0.02, 0.0, 0.01], dtype=torch.float64), constraint)
    slow = {"pbgd": 0.01, "pbgd, gradient norm": 0.005, "bome": 0.05, "meha": 0.2}  # x and y descend together
    solver = dataclasses.replace(case.solver, lr_x=slow.get(case.name, case.known.lr_x / 2))
    found = fit(problem, solver, TorchBackend(), steps=400 if case.name in slow else 100).x["value"]
    active = (solution == 0) | (solution == 1)
    torch.testing.assert_close(found[active], solution[active], rtol=0, atol=1e-9)
    torch.testing.assert_close(found, solution, rtol=0, atol=0.35)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_simplex_projection_is_the_nearest_of_a_fine_grid(dtype: torch.dtype) -> None:
    ticks = np.linspace(0, 1, 41)
    points = np.array([(a, b, 1 - a - b) for a, b in itertools.product(ticks, ticks) if a + b <= 1 + 1e-9])
    values = np.random.default_rng(0).normal(0, 1.5, (40, 3))
    found = Simplex().project(torch.tensor(values, dtype=dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.sum(-1), torch.ones(40, dtype=dtype))
    nearest = points[((values[:, None] - points) ** 2).sum(-1).argmin(1)]
    assert np.abs(found.numpy() - nearest).max() < 0.03
    assert (found >= 0).all()


def test_a_coupled_quadratic_ends_where_a_projected_gradient_by_hand_does() -> None:
    box = Box(-0.5, 0.5)
    problem = Quadratic(m=4, n=6, kappa=3.0, start=0.0)
    problem.upper_constraint = box
    result = fit(problem, AID(lr_x=0.12, lr_z=0.8, lower_steps=5, cg_steps=6), TorchBackend(), steps=120)
    x = torch.zeros(4, dtype=torch.float64)
    for _ in range(500):
        x = box.project(x - 0.1 * problem.forms.grad_phi(x))
    active = x.abs() == 0.5
    assert 0 < active.sum() < 4, "the instance must have active and inactive constraints"
    torch.testing.assert_close(result.x["value"], x, rtol=0, atol=1e-6)
    assert result.history[-1].upper["gradient"] < 1e-5 < float(problem.forms.grad_phi(x).norm())


def test_adamw_on_x_comes_to_rest_at_the_constrained_solution_and_nowhere_else() -> None:
    """Steps along the gradient would end where the signs of all positive entries agree."""
    problem = Near(TARGET, torch.full((4,), 0.25, dtype=torch.float64), Simplex())
    solver = F2SA(penalty=20.0, lr_x=0.05, lr_z=0.6, lower_steps=2, optimizer_x=AdamW(betas=(0.5, 0.9)))
    result = fit(problem, solver, TorchBackend(), steps=60)
    torch.testing.assert_close(result.x["value"], ON_SIMPLEX, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["box of tensors", "simplex"])
def test_runs_side_by_side_are_projected_as_each_alone(name: str) -> None:
    constraint, _ = SETS[name]
    problem = Near(TARGET, constraint.project(torch.zeros(4, dtype=torch.float64)), constraint)
    solvers = [F2SA(penalty=20.0, lr_x=lr, lr_z=0.6) for lr in (0.1, 0.3)]
    together = fit_many(problem, solvers, TorchBackend(), steps=12)
    for k, solver in enumerate(solvers):
        alone = fit(problem, solver, TorchBackend(), steps=12)
        torch.testing.assert_close(together.x["value"][k, 0], alone.x["value"], rtol=0, atol=1e-12)
        norms = torch.tensor([record.metrics["grad_norm_x"] for record in alone.history], dtype=torch.float64)
        torch.testing.assert_close(together.metrics["grad_norm_x"][k, 0], norms, rtol=1e-9, atol=1e-12)


def test_each_row_of_a_matrix_and_each_named_part_has_its_own_constraint() -> None:
    class Parts(Near):
        def upper(self) -> Any:
            return {"mix": self.start.reshape(2, 2), "rest": torch.full((), 0.5)}

        def lower_loss(self, x: Any, y: Any, batch: None) -> Tensor:
            return 0.5 * (y() - x("mix").flatten()).square().sum() + 0 * x("rest")

        def upper_loss(self, x: Any, y: Any, batch: None) -> Tensor:
            return super().upper_loss(x, y, batch) + (x("rest") + 1) ** 2

    problem = Parts(TARGET, torch.full((4,), 0.5, dtype=torch.float64))
    problem.upper_constraint = {"mix.value": Simplex(), "rest.value": NonNegative()}
    check_problem(problem)
    result = fit(problem, AID(lr_x=0.4, lr_z=1.0, lower_steps=1), TorchBackend(), steps=30)
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(result.x["mix.value"], rows, rtol=0, atol=1e-6)
    assert float(result.x["rest.value"]) == 0.0


def test_the_gradient_mapping_is_the_gradient_inside_and_zero_at_a_constrained_solution() -> None:
    x, gradient = torch.tensor([0.5, 1.0, 0.0]), torch.tensor([0.3, -2.0, 0.7])
    torch.testing.assert_close(mapping(Box(0, 1).project, x, gradient, 0.1), torch.tensor([0.3, 0.0, 0.0]))
    torch.testing.assert_close(mapping(Box(0, 1).project, x, gradient, 0.0), torch.tensor([0.3, 0.0, 0.0]))


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "a start outside": (Box(0, 1), TARGET, r"starts outside of Box\(.*distance of 0\.86; .*constraint\.project\(start\)"),
    "an unknown name": ({"weight": Box(0, 1)}, TARGET, "names 'weight', and the parameters of x are value"),
    "no constraint": ((0, 1), TARGET, r"upper_constraint has \(0, 1\).*give a bilevel\.Constraint"),
    "bounds of another shape": (Box(torch.zeros(3), 1), TARGET, r"shape \(3,\), which does not fit the shape \(4,\)"),
    "half precision": (NonNegative(), TARGET.abs().bfloat16(), "bfloat16, which rounds it out"),
}


@pytest.mark.parametrize(("constraint", "start", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_before_the_first_step(constraint: Any, start: Tensor, message: str) -> None:
    problem = Near(TARGET, start, constraint)
    with pytest.raises(InputError, match=message):
        fit(problem, AID(), TorchBackend(), steps=1)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Box(1, 0), "no number is between the bounds"),
        (lambda: Box(torch.zeros(2), torch.ones(3)), r"shapes \(2,\) and \(3,\)"),
        (lambda: Box(float("nan"), 1), "no number is between"),
        (lambda: Simplex(0.0), "total of a Simplex must be positive"),
    ],
)
def test_an_empty_set_is_refused_where_it_is_made(build: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build()


def test_a_projection_that_is_none_breaks_the_contract() -> None:
    class Halfway(Constraint):
        def project(self, value: Tensor) -> Tensor:
            return value / 2

    with pytest.raises(ContractError, match="moved by .* when it is projected again"):
        check_problem(Near(TARGET, torch.zeros(4, dtype=torch.float64), Halfway()))


def test_rounds_refuses_a_constraint_it_would_not_keep() -> None:
    with pytest.raises(InputError, match="rounds moves .* and knows no upper_constraint"):
        fit(Near(TARGET, ON_SIMPLEX, Simplex()), Rounds(), TorchBackend(), steps=2)
