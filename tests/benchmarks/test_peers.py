"""What other packages are judged by: the true objective, and the step at which it is low enough."""

import numpy as np
import pytest
import torch

from benchmarks.peers.reference import Reference, first_below
from bilevel import Shard
from bilevel_problems.logistic_regularization import LogisticRegularization
from bilevel_problems.quadratic import Quadratic


def test_the_reference_agrees_with_the_closed_form_of_the_quadratic() -> None:
    problem = Quadratic(m=2, n=4, kappa=3.0)
    F, x = problem.forms, problem.start_x
    reference = Reference(F.f, F.g, x.numpy(), problem.start_y.numpy())
    phi, slope = F.expansion(x)
    assert reference.phi(x.numpy()) == pytest.approx(float(phi), rel=1e-8)
    np.testing.assert_allclose(reference.gradient(x.numpy()), slope.numpy(), rtol=1e-6)
    assert reference.least() == pytest.approx(float(F.expansion(F.solution())[0]), rel=1e-9)


def test_the_gradient_of_the_reference_is_right_where_the_lower_level_is_not_quadratic() -> None:
    problem = LogisticRegularization(rows=20, d=3, start=-1.0)
    (upper,), (lower,) = (batch(0, Shard()) for batch in (problem.upper_batch, problem.lower_batch))
    reference = Reference(
        lambda x, y: problem.upper_loss(lambda: x, lambda: y, upper),
        lambda x, y: problem.lower_loss(lambda: x, lambda: y, lower),
        np.full(3, -1.0),
        np.zeros(3),
    )
    found = reference.gradient(reference.x)
    expected = problem.grad_phi(torch.from_numpy(reference.x), torch.from_numpy(reference.y))
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)


@pytest.mark.parametrize("first", [0, 1, 6, 7, 99, None])
def test_the_first_iterate_that_is_low_enough_is_found(first: int | None) -> None:
    path = [np.array([1.0 if first is None or k < first else 0.0]) for k in range(100)]
    assert first_below(lambda x: float(x[0]), path, 0.5) == first


def test_a_path_that_diverges_is_not_low_enough() -> None:
    assert first_below(lambda x: 0.0, [np.array([np.nan]), np.array([1e9])], 0.5) is None
