"""Conjugate gradients, and how AID tells that they failed."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from bilevel import AID, NonFiniteError, RunError, Vector, fit
from bilevel.solvers.aid import conjugate_gradients
from bilevel.testing.session import Session
from bilevel.testing.workload import check_workload
from bilevel_backends.torch_backend import TorchBackend
from bilevel_problems.logistic_regularization import LogisticRegularization
from bilevel_problems.quadratic import Quadratic
from tests.conftest import Distance


def vector(*values: float) -> Vector:
    return Vector({"value": torch.tensor(values, dtype=torch.float64)}, whole=True)


def times(matrix: Tensor) -> object:
    return lambda v: Vector({"value": matrix @ v.parts["value"]}, whole=True)


MATRIX = torch.tensor([[4.0, 1.0, 0.0], [1.0, 3.0, 0.5], [0.0, 0.5, 0.1]], dtype=torch.float64)


def test_conjugate_gradients_solve_in_as_many_steps_as_there_are_coordinates() -> None:
    b = vector(1.0, -2.0, 3.0)
    v, residual = conjugate_gradients(times(MATRIX), b, TorchBackend(), steps=3, tolerance=1e-12)
    torch.testing.assert_close(v.parts["value"], torch.linalg.solve(MATRIX, b.parts["value"]), rtol=1e-9, atol=0)
    assert residual < 1e-12


def test_the_last_iterate_is_what_the_residual_is_of() -> None:
    b = vector(1.0, -2.0, 3.0)
    v, residual = conjugate_gradients(times(MATRIX), b, TorchBackend(), steps=2, tolerance=1e-12)
    left = b.parts["value"] - MATRIX @ v.parts["value"]
    assert residual == pytest.approx(float(left.norm() / b.parts["value"].norm()))
    # two steps minimize the energy over the span of b and Hb; one step or none would not be orthogonal to both
    assert abs(float(left @ b.parts["value"])) < 1e-12
    assert abs(float(left @ (MATRIX @ b.parts["value"]))) < 1e-12


@pytest.mark.parametrize("steps", [1, 2, 3, 50])
def test_without_a_tolerance_v_is_that_of_bare_conjugate_gradients_after_as_many_products(steps: int) -> None:
    """No product more, and none once the residual is rounding, where another would divide zero by zero."""
    products = []

    def counted(v: Vector) -> Vector:
        products.append(1)
        return times(MATRIX)(v)  # type: ignore[operator]

    b = vector(1.0, -2.0, 3.0)
    v, residual = conjugate_gradients(counted, b, TorchBackend(), steps=steps, tolerance=None)
    bare, r = torch.zeros(3, dtype=torch.float64), b.parts["value"]
    p = r
    for _ in range(min(steps, 3)):
        a = (r @ r) / (p @ MATRIX @ p)
        bare, left = bare + a * p, r - a * MATRIX @ p
        r, p = left, left + (left @ left) / (r @ r) * p
    torch.testing.assert_close(v.parts["value"], bare, rtol=1e-9, atol=0)
    assert len(products) == steps if steps <= 3 else len(products) <= 5
    assert residual == pytest.approx(float(r.norm() / b.parts["value"].norm()), rel=1e-9, abs=1e-12)


def test_without_a_tolerance_x_moves_along_what_the_products_give() -> None:
    """One product: v is the minimizer along ∇_y f, (b'b / b'Hb) b, which is far from the solution, and the run goes on."""
    problem = Quadratic(m=2, n=8, kappa=100.0)
    F = problem.forms
    with Session(problem, AID(lr_x=1.0, lower_steps=1, cg_steps=1, cg_tolerance=None)) as session:
        x = session.values("x")
        metrics = session.step()
        z = session.values("z")
        b = F.B @ (z - F.t) + F.E.T @ x
        v = (b @ b) / (b @ F.A @ b) * b
        torch.testing.assert_close(x - session.values("x"), F.D @ x + F.E @ z + F.d - F.C.T @ v, rtol=0, atol=1e-11)
    assert metrics["cg_residual"] == pytest.approx(float((b - F.A @ v).norm() / b.norm()))
    assert metrics["cg_residual"] > 0.1


def test_without_a_tolerance_a_step_takes_a_product_less() -> None:
    check_workload(AID(cg_steps=2, cg_tolerance=None), Quadratic(m=2, n=8, kappa=100.0))


def test_a_right_hand_side_of_zero_gives_zero() -> None:
    v, residual = conjugate_gradients(times(MATRIX), vector(0.0, 0.0, 0.0), TorchBackend(), steps=3, tolerance=1e-12)
    assert not v.parts["value"].any()
    assert residual == 0


def test_negative_curvature_and_infinities_stop() -> None:
    with pytest.raises(RunError, match="not strongly convex"):
        conjugate_gradients(times(-MATRIX), vector(1.0, 0.0, 0.0), TorchBackend(), steps=3, tolerance=1e-12)
    with pytest.raises(NonFiniteError, match="not finite"):
        conjugate_gradients(times(MATRIX), vector(1.0, float("inf"), 0.0), TorchBackend(), steps=3, tolerance=1e-12)


def test_too_few_conjugate_gradient_steps_stop_the_run() -> None:
    problem = Quadratic(m=2, n=8, kappa=100.0)
    with pytest.raises(RunError, match=r"step 0: conjugate gradients left a residual of .* raise cg_steps"):
        fit(problem, AID(cg_steps=2, cg_tolerance=1e-10), TorchBackend(), steps=1)


def test_x_moves_along_the_implicit_hypergradient_where_the_lower_level_is_not_quadratic() -> None:
    """400 inner steps leave z at y* to rounding, where the hypergradient has a closed form in terms of y*."""
    problem = LogisticRegularization(rows=40, d=4, start=-1.0)
    with Session(problem, AID(lr_x=1.0, lr_z=1.0, lower_steps=400, cg_tolerance=1e-12)) as session:
        before = session.values("x")
        session.step()
        moved = before - session.values("x")
        expected = problem.grad_phi(before, session.values("z"))
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-10)


@dataclass
class Saddle(Distance):
    """A lower loss that is concave in one direction."""

    def lower_loss(self, x, y, batch):  # type: ignore[no-untyped-def]
        return super().lower_loss(x, y, batch) - len(batch) / 4 * 2.0 * y()[0] ** 2


def test_a_lower_loss_that_is_not_convex_stops_the_run() -> None:
    with pytest.raises(RunError, match="not strongly convex"):
        fit(Saddle(), AID(lr_z=0.01, lower_steps=1), TorchBackend(), steps=3)
