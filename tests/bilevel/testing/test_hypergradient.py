import pytest
import torch

from bilevel.testing.hypergradient import NotSolvedError, conjugate_gradients, hypergradient, minimize, penalized_solution
from bilevel_problems.logistic_regularization import LogisticRegularization
from bilevel_problems.quadratic import Quadratic
from bilevel_problems.ridge_reweighting import RidgeReweighting


def test_implicit_differentiation_agrees_with_the_analytic_hypergradient() -> None:
    problem = LogisticRegularization()
    answer = hypergradient(problem)
    x = torch.full((10,), problem.start, dtype=torch.float64)
    torch.testing.assert_close(answer.value["value"], problem.grad_phi(x, answer.y["value"]), rtol=1e-10, atol=1e-12)
    assert answer.residual <= 1e-12


def test_the_dense_and_the_iterative_solve_agree() -> None:
    problem = RidgeReweighting()
    dense, iterative = hypergradient(problem), hypergradient(problem, dense=0)
    torch.testing.assert_close(dense.value["logits"], iterative.value["logits"], rtol=1e-9, atol=1e-12)


def test_the_penalized_lower_solution_is_the_closed_form() -> None:
    problem = Quadratic()
    found = penalized_solution(problem, 30.0)["value"]
    torch.testing.assert_close(found, problem.forms.penalized_solution(problem.start_x, 30.0), rtol=1e-10, atol=1e-10)


def test_a_lower_level_without_a_minimum_is_refused() -> None:
    with pytest.raises(NotSolvedError):
        minimize(lambda y: -(y**2).sum() + (y**4).sum() * 0, torch.ones(2, dtype=torch.float64), tolerance=1e-12)


def test_a_nonconvex_function_is_solved_where_it_has_a_minimum() -> None:
    y = minimize(lambda v: ((v**2 - 1) ** 2).sum(), torch.tensor([0.1, -0.2], dtype=torch.float64), tolerance=1e-12)
    torch.testing.assert_close(y, torch.tensor([1.0, -1.0], dtype=torch.float64))


def test_conjugate_gradients_refuse_negative_curvature() -> None:
    with pytest.raises(NotSolvedError, match="positive definite"):
        conjugate_gradients(lambda v: -v, torch.ones(3, dtype=torch.float64))
