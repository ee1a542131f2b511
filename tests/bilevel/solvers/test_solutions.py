"""Every solver against the closed forms of the quadratic: where its variables rest, and along what x moves."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bilevel import BOME, InputError, Metrics, fit
from bilevel.active import LISA
from bilevel.testing.session import Session
from bilevel_backends.torch_backend import TorchBackend
from tests.bilevel.solvers.grid import CASES, LR_X, Case, grid, small

with_optimum = grid(without=lambda case: case.known.optimum is None)
of_second_order = grid(without=lambda case: not case.second_order)


@with_optimum
def test_at_the_lower_optimum_x_moves_along_the_closed_form_gradient(case: Case) -> None:
    """Rounding is multiplied by the penalty (20) and divided by the step (0.01): 1e-11 leaves it a factor of 20."""
    problem = small()
    with Session(problem, case.solver) as session:
        x = session.values("x")
        optimum = case.known.optimum(problem.forms, x)
        for variable, value in optimum.items():
            session.put(variable, {"value": value})
        session.step()
        moved = (x - session.values("x")) / LR_X
        torch.testing.assert_close(moved, case.known.scale * case.known.gradient(problem.forms, x), rtol=0, atol=1e-11)
        for variable, value in optimum.items():
            torch.testing.assert_close(session.values(variable), value, rtol=0, atol=1e-13)


@with_optimum
def test_with_x_held_the_lower_variables_go_to_their_optimum(case: Case) -> None:
    """The slowest loses 10% in a lower step (curvature 1/3, step 0.3): 120 leave 4e-6 of the start, which is below 10."""
    problem = small()
    with Session(problem, dataclasses.replace(case.solver, lr_x=0.0)) as session:
        x = session.values("x")
        session.step(120 if case.registered == "pbgd" else 120 // getattr(case.solver, "lower_steps", 1))
        for variable, value in case.known.optimum(problem.forms, x).items():
            torch.testing.assert_close(session.values(variable), value, rtol=0, atol=4e-5)


@grid(without=lambda case: case.known.optimum is None or case.second_order)
def test_with_some_blocks_frozen_the_lower_optimum_is_the_same_and_frozen_blocks_do_not_move(case: Case) -> None:
    problem = small(split=4)
    with Session(problem, case.solver, active=LISA(blocks=2, period=1)) as session:
        x = session.values("x")
        optimum = case.known.optimum(problem.forms, x)
        for variable, value in optimum.items():
            session.put(variable, {f"blocks.{i}.value": value[i : i + 1] for i in range(4)})
        session.step()
        for variable, value in optimum.items():
            torch.testing.assert_close(session.values(variable), value, rtol=0, atol=1e-13)
        torch.testing.assert_close(
            (x - session.values("x")) / LR_X, case.known.scale * case.known.gradient(problem.forms, x), rtol=0, atol=1e-11
        )
        before = {variable: session.values(variable) for variable in optimum}
        session.step()
        frozen = [int(name[-1]) for name in {f"blocks.{i}" for i in range(4)} - session.variable(variable).active]
        for variable in optimum:
            assert torch.equal(session.values(variable)[frozen], before[variable][frozen])


@of_second_order
def test_second_derivatives_with_frozen_blocks_are_refused(case: Case) -> None:
    with pytest.raises(InputError, match="blocks of the lower variable frozen"):
        fit(small(split=4), case.solver, TorchBackend(), steps=1, active=LISA(blocks=2))


@of_second_order
def test_a_backend_without_second_derivatives_is_refused_before_running(case: Case) -> None:
    backend = TorchBackend(compile=True)
    with pytest.raises(InputError, match=rf"{case.registered}.*second derivatives.*TorchBackend"):
        fit(small(), case.solver, backend, steps=1)
    assert backend.processed == 0


@pytest.mark.parametrize("name", ["f2sa", "f3sa", "f2ba", "f2sa-p, p=1", "pbgd"])
def test_the_noise_that_the_lower_variables_share_cancels(name: str) -> None:
    """Noise of size 5, times a penalty of 20, leaves no trace in x: all lower variables see the same minibatch."""
    case, steps = CASES[name], {}
    for noise in (0.0, 5.0):
        problem = small(lower_noise=noise)
        with Session(problem, dataclasses.replace(case.solver, lr_z=0.0)) as session:
            session.step()
            steps[noise] = session.values("x")
    torch.testing.assert_close(steps[0.0], steps[5.0], rtol=0, atol=1e-12)


def test_bome_takes_the_smallest_multiplier_that_descends_on_the_gap() -> None:
    """Its step, put together from the closed forms of the losses; where λ > 0, <d, ∇q> is η ‖∇q‖² exactly."""
    d, grad_f, grad_q, metrics = bome_step(towards_lower=True)
    assert metrics["penalty"] > 0
    assert float(d @ grad_q) == pytest.approx(0.7 * float(grad_q @ grad_q), rel=1e-10)
    torch.testing.assert_close(d, grad_f + metrics["penalty"] * grad_q, rtol=0, atol=1e-11)


def test_bome_follows_f_alone_where_that_descends_on_the_gap_already() -> None:
    d, grad_f, grad_q, metrics = bome_step(towards_lower=False)
    assert metrics["penalty"] == 0
    assert float(d @ grad_q) > 0.7 * float(grad_q @ grad_q)
    torch.testing.assert_close(d, grad_f, rtol=0, atol=1e-11)


def bome_step(*, towards_lower: bool) -> tuple[Tensor, Tensor, Tensor, Metrics]:
    """One step (as -change), and ∇f and ∇q by the closed forms; f pulls y towards y*(x), or away from it."""
    problem = small()
    F = problem.forms
    with Session(problem, BOME(eta=0.7, lr_x=1.0, lr_z=0.6, lower_steps=3)) as session:
        x = session.values("x")
        error = (-0.1 if towards_lower else 0.1) * torch.linalg.solve(F.A, F.slope(x))
        y = F.lower_solution(x) + error
        session.put("y", {"value": y})
        metrics = session.step()
        d = torch.cat([x - session.values("x"), y - session.values("y")])
    left = torch.linalg.matrix_power(torch.eye(4, dtype=torch.float64) - 0.6 * F.A, 3) @ error
    grad_q = torch.cat([F.C.T @ (error - left), F.A @ error])
    grad_f = torch.cat([F.D @ x + F.E @ y + F.d, F.B @ (y - F.t) + F.E.T @ x])
    return d, grad_f, grad_q, metrics


def test_bome_ends_where_the_truncated_hypergradient_vanishes() -> None:
    """T inner steps leave M = (I - β A)^T of y's error, so that x rests where f_x - C'(I - M) A⁻¹ f_y = 0.

    y hovers off y*(x) by the order of the step, and x with it: measured 0.003 at steps of 0.05. With T = 2 that point is
    0.14 from x*: the bias that the inner steps leave.
    """
    problem, eye = small(), torch.eye(4, dtype=torch.float64)
    F = problem.forms
    M = torch.linalg.matrix_power(eye - 0.9 * F.A, 2)

    def truncated(x: Tensor) -> Tensor:
        return F.D @ x + F.E @ F.lower_solution(x) + F.d - F.C.T @ (eye - M) @ torch.linalg.solve(F.A, F.slope(x))

    expected = root(truncated)
    x = fit(problem, BOME(lr_x=0.05, lr_z=0.9, lower_steps=2), TorchBackend(), steps=400).x["value"]
    assert torch.dist(x, expected) < 0.006
    assert torch.dist(expected, F.solution()) > 0.1


def root(linear: Callable[[Tensor], Tensor]) -> Tensor:
    """Where a linear function of two coordinates vanishes."""
    at_zero = linear(torch.zeros(2, dtype=torch.float64))
    slope = torch.stack([linear(e) - at_zero for e in torch.eye(2, dtype=torch.float64)], dim=1)
    return -torch.linalg.solve(slope, at_zero)


@pytest.mark.parametrize(
    ("name", "lr_x", "steps"), [("f2sa-p, p=2", 0.3, 80), ("meha", 2.0, 350), ("aid", 0.3, 80), ("soba", 0.1, 200)]
)
def test_from_the_start_the_whole_method_ends_at_its_own_stationary_point(name: str, lr_x: float, steps: int) -> None:
    """Linear convergence by 0.81 a step, or by 0.97 and 0.94 where x and y descend together: at most 2e-5 of the start is left."""
    case = CASES[name]
    expected = root(lambda x: case.known.gradient(small().forms, x))
    solver = dataclasses.replace(case.solver, lr_x=lr_x)
    x = fit(small(), solver, TorchBackend(), steps=steps).x["value"]
    torch.testing.assert_close(x, expected, rtol=0, atol=3e-5)
