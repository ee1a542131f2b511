"""F2SA, F2BA, F3SA and F2SA-p: schedules, coefficients, momentum, and how they relate to each other."""

import dataclasses
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from bilevel import F2BA, F2SA, F3SA, SGD, AdamW, F2SAp, InputError, Power, ScaleBiO, Solver, fit
from bilevel.active import LISA
from bilevel.schedule import at
from bilevel.solvers.f2sa_p import difference
from bilevel.testing.session import Session
from bilevel_backends.torch_backend import TorchBackend
from bilevel_problems.quadratic import Quadratic
from tests.bilevel.solvers.grid import small


def x_after(solver: Solver, steps: int, **noise: float) -> Tensor:
    return fit(small(**noise), solver, TorchBackend(), steps=steps, seed=3).x["value"]


NOISY = {"upper_noise": 0.3, "lower_noise": 0.3}


def test_f2ba_is_f2sa_at_a_fixed_penalty_with_k_steps() -> None:
    f2ba = F2BA(penalty=30.0, lr_z=0.5, lr_x=0.02, lower_steps=4)
    f2sa = F2SA(penalty=30.0, lr_z=0.5, lr_y=0.25, lr_x=0.02, lower_steps=4)
    assert torch.equal(x_after(f2ba, 3, **NOISY), x_after(f2sa, 3, **NOISY))


def test_f2sa_p_of_order_one_is_f2sa_with_equal_steps_of_y_and_z() -> None:
    first = F2SAp(p=1, penalty=30.0, lr_z=0.5, lr_x=0.02, lower_steps=2)
    f2sa = F2SA(penalty=30.0, lr_z=0.5, lr_y=0.5, lr_x=0.02, lower_steps=2)
    torch.testing.assert_close(x_after(first, 3, **NOISY), x_after(f2sa, 3, **NOISY), rtol=0, atol=1e-11)


def test_f3sa_without_momentum_is_a_single_loop_of_gradient_steps() -> None:
    f3sa = F3SA(penalty=30.0, lr_z=0.5, lr_y=0.4, lr_x=0.02, momentum=1.0)
    plain = ScaleBiO(penalty=30.0, lr_z=0.5, lr_y=0.4, lr_x=0.02, warmup=0, optimizer_x=SGD(), optimizer_z=SGD())
    torch.testing.assert_close(x_after(f3sa, 4, **NOISY), x_after(plain, 4, **NOISY), rtol=0, atol=1e-11)


def test_f2sa_takes_half_steps_of_y_and_the_step_alpha_of_x() -> None:
    """α = γ / (2 λ), the step of y on f + λ g and, with ξ = 1, that of x."""
    implicit = F2SA(penalty=30.0, lr_z=0.5)
    explicit = F2SA(penalty=30.0, lr_z=0.5, lr_y=0.25, lr_x=0.5 / 60)
    assert torch.equal(x_after(implicit, 3, **NOISY), x_after(explicit, 3, **NOISY))
    implicit3, explicit3 = (
        F3SA(**{n: getattr(s, n) for n in ("penalty", "lr_z", "lr_y", "lr_x")}) for s in (implicit, explicit)
    )
    assert torch.equal(x_after(implicit3, 3, **NOISY), x_after(explicit3, 3, **NOISY))


@pytest.mark.parametrize(
    ("kind", "noise", "a", "c", "rate"),
    [
        (F2SA, "both", 5 / 7, 4 / 7, 2 / 7),
        (F2SA, "upper", 3 / 5, 2 / 5, 2 / 5),
        (F2SA, "none", 1 / 3, 0, 2 / 3),
        (F3SA, "both", 3 / 5, 2 / 5, 2 / 5),
        (F3SA, "upper", 1 / 2, 1 / 4, 1 / 2),
        (F3SA, "none", 1 / 3, 0, 2 / 3),
    ],
)
def test_the_schedules_have_the_exponents_that_balance_bias_and_noise(
    kind: type[F2SA] | type[F3SA], noise: str, a: float, c: float, rate: float
) -> None:
    """λ² grows with exponent 2 (a - c); so falls the squared bias, and it must equal what noise leaves of λ² Var."""
    solver = kind.for_noise(noise, penalty=2.0, lr_z=0.8, xi=2.0, scale=10.0)  # type: ignore[arg-type]
    for t in (0, 7, 1000):
        r = 1 + t / 10
        assert at(solver.penalty, t) == pytest.approx(2 * r ** (a - c))
        assert at(solver.lr_z, t) == pytest.approx(0.8 * r**-c)
        assert at(solver.lr_x, t) == pytest.approx(2 * 0.2 * r**-a)  # type: ignore[arg-type]
        if kind is F3SA:
            assert at(solver.momentum, t) == pytest.approx(r ** (-2 * c))
    assert 2 * (a - c) == pytest.approx(rate)
    memory = 2 if kind is F3SA else 1  # momentum doubles how fast the noise of an estimate falls
    left = {"both": memory * c - 2 * (a - c), "upper": memory * c, "none": rate}[noise]
    assert left == pytest.approx(rate)


def test_the_defaults_are_the_schedules_for_noise_in_both_levels() -> None:
    for kind in (F2SA, F3SA):
        default, chosen = kind(), kind.for_noise("both")
        for t in (0, 50, 5000):
            assert at(default.penalty, t) == pytest.approx(at(chosen.penalty, t))
            assert at(default.lr_z, t) == pytest.approx(at(chosen.lr_z, t))
            assert at(default.lr_z, t) / 2 / at(default.penalty, t) == pytest.approx(at(chosen.lr_x, t))  # type: ignore[arg-type]


def test_momentum_follows_the_recursion_with_the_same_minibatch_at_both_points() -> None:
    """h_gz recomputed from the iterates, the closed-form gradient and the noise of each minibatch."""
    problem, η = small(lower_noise=1.0), 0.3
    F = problem.forms
    with Session(problem, F3SA(penalty=5.0, lr_z=0.4, lr_x=0.05, momentum=η)) as session:

        def gradient(z: Tensor, x: Tensor, t: int) -> Tensor:
            (batch,) = problem.lower_batch(t, session.backend.shard)
            return F.A @ z + F.C @ x + F.b + batch.along_y

        points: list[tuple[Tensor, Tensor]] = []
        h = torch.zeros(4, dtype=torch.float64)
        for t in range(5):
            points.append((session.values("z"), session.values("x")))
            session.step()
            carried = (1 - η) * (h - gradient(*points[t - 1], t)) if t else 0
            h = gradient(*points[t], t) + carried
            torch.testing.assert_close(session.values("h_gz"), h, rtol=0, atol=1e-13)
            torch.testing.assert_close(session.values("z"), points[t][0] - 0.4 * h, rtol=0, atol=1e-13)


def test_momentum_reduces_the_noise_of_the_estimate() -> None:
    """At a fixed point the estimate is a moving average with weights η: variance η / (2 - η) of that of one gradient."""
    problem, η = Quadratic(m=1, n=1, kappa=1, copies=400, upper_noise=1.0), 0.1
    solver = F3SA(penalty=1e9, lr_z=0.0, lr_y=0.0, lr_x=0.0, momentum=η)
    with Session(problem, solver) as session:
        session.step(60)
        spread = float(session.values("h_fy").std())
    assert spread == pytest.approx((η / (2 - η)) ** 0.5, rel=0.15)  # 400 copies: 3.5% standard error


def test_momentum_starts_afresh_when_the_active_blocks_change() -> None:
    problem = small(split=4, lower_noise=1.0)
    with Session(problem, F3SA(penalty=5.0, momentum=0.1), active=LISA(blocks=2, period=3)) as session:
        renewals = []
        for t in range(6):
            x, z = session.values("x"), session.values("z")
            active = session.active.at(t, session.variable("z").blocks, session.seed)
            renewals.append(sorted(active) != session.state.memory["active"])
            session.step()
            (batch,) = problem.lower_batch(t, session.backend.shard)
            plain = problem.forms.A @ z + problem.forms.C @ x + problem.forms.b + batch.along_y
            index = [int(block[-1]) for block in active]
            assert torch.allclose(session.values("h_gz")[index], plain[index], rtol=0, atol=1e-12) == renewals[-1]
    assert renewals == [True, False, False, True, False, False]


@pytest.mark.parametrize(
    ("p", "coefficients"),
    [
        (1, {0: "-1", 1: "1"}),
        (2, {-1: "-1/2", 1: "1/2"}),
        (3, {-1: "-1/3", 0: "-1/2", 1: "1", 2: "-1/6"}),
        (4, {-2: "1/12", -1: "-2/3", 1: "2/3", 2: "-1/12"}),
        (5, {-2: "1/20", -1: "-1/2", 0: "-1/3", 1: "1", 2: "-1/4", 3: "1/30"}),
    ],
)
def test_the_difference_has_the_coefficients_of_the_tables(p: int, coefficients: dict[int, str]) -> None:
    assert difference(p) == {j: Fraction(c) for j, c in coefficients.items()}


@pytest.mark.parametrize("p", range(1, 13))
def test_the_difference_is_exact_for_polynomials_up_to_its_order(p: int) -> None:
    c = difference(p)
    assert len(c) == p + p % 2
    for degree in range(p + 1):
        assert sum(weight * j**degree for j, weight in c.items()) == (degree == 1)


def test_a_normalized_step_of_x_has_the_length_of_the_step_size() -> None:
    plain = F2SAp(p=2, penalty=30.0, lr_x=0.02)
    starts = small().start_x
    long, unit = (x_after(dataclasses.replace(plain, normalized=n), 1) - starts for n in (False, True))
    assert float(unit.norm()) == pytest.approx(0.02, rel=1e-12)
    torch.testing.assert_close(unit / unit.norm(), long / long.norm(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("p", "works", "too_large"), [(2, 6e7, 8e7), (4, 5e3, 2e4), (8, 50.0, 150.0)])
def test_an_order_that_drowns_in_rounding_is_refused_before_running(p: int, works: float, too_large: float) -> None:
    fit(small(), F2SAp(p=p, penalty=works, lr_x=0.0), TorchBackend(), steps=1)
    backend = TorchBackend()
    with pytest.raises(InputError, match=f"p = {p}.*lower the penalty to at most"):
        fit(small(), F2SAp(p=p, penalty=too_large), backend, steps=1)
    assert backend.processed == 0


@pytest.mark.parametrize(
    ("kind", "settings", "name"),
    [
        (F2SA, {"penalty": 0.0}, "penalty"),
        (F2SA, {"lower_steps": 0}, "lower_steps"),
        (F3SA, {"momentum": 1.5}, "momentum"),
        (F2SAp, {"p": 0}, "p must"),
        (F2BA, {"penalty": -1.0}, "penalty"),
        (F2SA, {"penalty": Power(0.0, 1.0)}, "penalty"),
    ],
)
def test_settings_that_make_no_sense_are_refused(kind: type[Solver], settings: dict[str, object], name: str) -> None:
    with pytest.raises((ValueError, InputError), match=name):
        kind(**settings)


def test_with_adamw_the_step_of_y_does_not_shrink_with_the_penalty() -> None:
    """The gradient of y is that of g + f/λ, so that optimizers which ignore its scale move y and z alike."""
    moves = {}
    for penalty in (10.0, 1e6):
        solver = F2SA(penalty=penalty, lr_z=0.01, lr_y=0.01, lr_x=0.0, optimizer_z=AdamW())
        with Session(small(), solver) as session:
            session.step()
            moves[penalty] = session.values("y")
    torch.testing.assert_close(moves[10.0].abs(), moves[1e6].abs(), rtol=1e-6, atol=0)
