import pytest
import torch

from bilevel import SGD, AdamW, NonFiniteError, Power, ScaleBiO, fit
from bilevel.solvers.scalebio import Flattening
from bilevel_backends.torch_backend import TorchBackend
from tests.conftest import Distance

PLAIN = {"optimizer_x": SGD(), "optimizer_z": SGD(), "warmup": 0}


@pytest.mark.parametrize(("lower_steps", "penalty"), [(1, 2.0), (1, 100.0), (3, 10.0)])
def test_it_ends_at_the_stationary_point_of_the_penalized_problem(lower_steps: int, penalty: float) -> None:
    """Linear convergence; 900 steps leave less than 1e-9 (measured 1e-12), rounding in float64 is far below."""
    problem = Distance()
    solver = ScaleBiO(penalty=penalty, lr_x=0.04, lr_z=0.5, lower_steps=lower_steps, **PLAIN)
    result = fit(problem, solver, TorchBackend(), steps=900)
    torch.testing.assert_close(result.x["value"], problem.penalized_solution(penalty), rtol=1e-8, atol=1e-8)


def test_the_bias_shrinks_as_one_over_the_penalty() -> None:
    problem = Distance()
    bias = [torch.dist(problem.penalized_solution(a), problem.solution()).item() for a in (50.0, 100.0)]
    assert bias[0] / bias[1] == pytest.approx(2, rel=0.05)
    result = fit(problem, ScaleBiO(penalty=1e4, lr_x=0.04, lr_z=0.5, **PLAIN), TorchBackend(), steps=1500)
    assert torch.dist(result.x["value"], problem.solution()) < 1e-3


def test_the_stable_step_of_x_does_not_shrink_with_the_penalty() -> None:
    """y and z move with the same effective step; with lr_y at half of it, the same lr_x diverges at a large penalty."""
    problem, penalty = Distance(), 1e4
    shared = fit(problem, ScaleBiO(penalty=penalty, lr_x=0.04, lr_z=0.5, **PLAIN), TorchBackend(), steps=800)
    assert torch.dist(shared.x["value"], problem.solution()) < 1e-3
    apart = ScaleBiO(penalty=penalty, lr_x=0.04, lr_z=0.5, lr_y=0.25, **PLAIN)
    with pytest.raises(NonFiniteError):
        fit(problem, apart, TorchBackend(), steps=800)


def test_both_replicas_see_the_same_minibatch() -> None:
    """With additive noise the noise of g(y) - g(z) cancels exactly: one step of x is then the same for any noise."""
    steps = {}
    for noise in (0.0, 5.0):
        problem = Distance(noise=noise, ridge=0.0)
        solver = ScaleBiO(penalty=1000.0, lr_x=1.0, lr_z=0.0, **PLAIN)
        steps[noise] = fit(problem, solver, TorchBackend(), steps=1).x["value"]
    torch.testing.assert_close(steps[0.0], steps[5.0], rtol=0, atol=1e-10)


def test_warm_up_holds_x_and_starts_y_where_z_is() -> None:
    solver = ScaleBiO(penalty=5.0, lr_x=0.1, lr_z=0.3, optimizer_z=AdamW(), warmup=4)
    history = fit(Distance(noise=0.1), solver, TorchBackend(), steps=7).history
    assert [record.moved for record in history] == [False] * 4 + [True] * 3
    assert all(record.upper == {"x0": 0.0, "x1": 0.0, "x2": 0.0} for record in history[:4])
    assert history[4].metrics["gap"] == 0.0  # equal weights, equal losses
    assert history[5].metrics["gap"] != 0.0


def test_warm_up_ends_when_the_lower_loss_has_flattened() -> None:
    rule = Flattening(window=3, at_most=50)
    falling = [10.0 - t for t in range(8)]
    assert not rule.over(falling[:5])  # too short to compare two windows
    assert not rule.over(falling)
    assert rule.over([*falling, 2.1, 1.9, 2.0, 2.0, 2.1, 1.9])
    assert rule.over([10.0 - t / 10 for t in range(50)])  # in any case


def test_the_penalty_may_grow() -> None:
    solver = ScaleBiO(penalty=Power(2.0, 1.0, scale=1.0), lr_x=0.1, lr_z=0.1, **PLAIN)
    history = fit(Distance(), solver, TorchBackend(), steps=4).history
    assert [record.metrics["penalty"] for record in history] == [2.0, 4.0, 6.0, 8.0]


def test_settings_that_make_no_sense_are_refused() -> None:
    for settings in ({"penalty": 0.0}, {"lower_steps": 0}, {"warmup": -1}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            ScaleBiO(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(("fall", "over"), [(0.9, True), (1.1, False)])
def test_a_fall_by_more_than_one_standard_error_is_no_plateau(fall: float, over: bool) -> None:
    """Two windows of four with standard deviation s: the standard error of the difference of their means is s / √2."""
    window = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    error = float(window.std()) / 2**0.5
    losses = [*(5.0 + fall * error + window).tolist(), *(5.0 + window).tolist()]
    assert Flattening(window=4).over(losses) == over
