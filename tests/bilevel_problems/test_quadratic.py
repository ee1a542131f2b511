import pytest
import torch

from bilevel import SGD, ScaleBiO, Shard, fit
from bilevel.testing.contract import check_problem
from bilevel.testing.hypergradient import hypergradient
from bilevel.testing.session import Session
from bilevel_backends.torch_backend import TorchBackend
from bilevel_problems.quadratic import Quadratic
from bilevel_problems.quadratic_forms import QuadraticForms

PLAIN = {"optimizer_x": SGD(), "optimizer_z": SGD(), "warmup": 0}


@pytest.mark.parametrize(("m", "n", "kappa", "seed"), [(1, 1, 1.0, 0), (2, 4, 3.0, 1), (5, 8, 100.0, 2)])
def test_the_condition_number_is_the_one_asked_for_and_f_is_strongly_convex(m: int, n: int, kappa: float, seed: int) -> None:
    forms = QuadraticForms.random(m, n, kappa, seed)
    eigenvalues = torch.linalg.eigvalsh(forms.A)
    joint = torch.cat([torch.cat([forms.D, forms.E], 1), torch.cat([forms.E.T, forms.B], 1)])
    assert float(eigenvalues[-1] / eigenvalues[0]) == pytest.approx(kappa if n > 1 else 1.0, rel=1e-9)
    assert float(torch.linalg.eigvalsh(joint)[0]) > 0


def test_no_coefficient_vanishes_as_that_would_hide_errors() -> None:
    forms = QuadraticForms.random(5, 8, 10.0, 0)
    x = torch.ones(5, dtype=torch.float64)
    y = forms.lower_solution(x)
    assert all(
        float(value.norm()) > 0.1 for value in (forms.B, forms.E, y @ forms.C + x @ forms.Q + forms.q, forms.slope(x))
    )


def test_closed_forms_take_leading_dimensions() -> None:
    forms = QuadraticForms.random(3, 4, 5.0, 0, rho=1.0)
    xs = torch.randn(2, 7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for function in (forms.grad_phi, forms.lower_solution, forms.slope, lambda x: forms.bias(x, 10.0)):
        torch.testing.assert_close(function(xs)[1, 5], function(xs[1, 5]))
    torch.testing.assert_close(forms.phi(xs)[1, 5], forms.phi(xs[1, 5]))


def test_the_expansion_around_0_gives_phi_and_its_gradient() -> None:
    """To the rounding of the linear systems, of condition number 50, that the direct formulas solve at every point."""
    for rho in (0.0, 2.0):
        forms = QuadraticForms.random(3, 6, 50.0, 0, rho=rho)
        xs = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        for x in (xs, xs[0]):
            phi, grad_phi = forms.expansion(x)
            torch.testing.assert_close(phi, forms.phi(x), rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(grad_phi, forms.grad_phi(x), rtol=1e-11, atol=1e-11)


def test_weights_that_are_no_difference_leave_an_error_that_the_formula_has() -> None:
    forms = QuadraticForms.random(2, 3, 3.0, 0)
    x = torch.ones(2, dtype=torch.float64)
    doubled = forms.difference_bias(x, 100.0, {-1: -1.0, 1: 1.0})
    torch.testing.assert_close(doubled, forms.grad_phi(x) + 2 * forms.difference_bias(x, 100.0, {-1: -0.5, 1: 0.5}))


def test_the_nonconvex_term_changes_phi_and_no_bias() -> None:
    plain, wavy = QuadraticForms.random(3, 4, 5.0, 0), QuadraticForms.random(3, 4, 5.0, 0, rho=2.0)
    x = torch.ones(3, dtype=torch.float64)
    assert not torch.allclose(plain.grad_phi(x), wavy.grad_phi(x))
    torch.testing.assert_close(plain.bias(x, 7.0), wavy.bias(x, 7.0), rtol=0, atol=0)


def test_it_keeps_the_contract_of_a_problem() -> None:
    check_problem(Quadratic(upper_noise=0.1, lower_noise=0.2, batch_size=6, split=4, rho=1.0), tolerance=1e-10)
    check_problem(Quadratic(copies=3, lower_noise=0.2, batch_size=2), tolerance=1e-10)


def test_noise_has_the_deviation_asked_for_and_is_independent_between_levels_and_copies() -> None:
    problem = Quadratic(upper_noise=0.5, lower_noise=2.0, batch_size=4, copies=2000)
    (upper,), (lower,) = problem.upper_batch(0, Shard()), problem.lower_batch(0, Shard())
    # the mean of 4 samples has half their deviation; 10 000 draws give it to 1 %
    assert float(upper.along_x.std()) == pytest.approx(0.25, rel=0.03)
    assert float(lower.along_y.std()) == pytest.approx(1.0, rel=0.03)
    pairs = torch.stack([upper.along_x[:, 0], lower.along_x[:, 0], upper.along_x[:, 1], upper.along_y[:, 0]])
    assert float((torch.corrcoef(pairs) - torch.eye(4)).abs().max()) < 0.1


def test_a_batch_depends_on_index_and_seed() -> None:
    problem = Quadratic(lower_noise=1.0)
    draws = [problem.lower_batch(index, Shard(seed=seed))[0].along_y for index in (0, 1) for seed in (0, 1)]
    assert len({float(draw[0]) for draw in draws}) == 4


def test_copies_are_independent_runs() -> None:
    forms = QuadraticForms.random(2, 3, 3.0, 0)
    starts = torch.tensor([[1.0, 2.0], [-3.0, 0.5]], dtype=torch.float64)
    solver = ScaleBiO(penalty=20.0, lr_x=0.05, lr_z=0.8, **PLAIN)
    with Session(Quadratic.of(forms, x=starts, copies=2), solver) as both:
        both.step(10)
        together = both.values("x")
    for row, start in enumerate(starts):
        with Session(Quadratic.of(forms, x=start), solver) as alone:
            alone.step(10)
            torch.testing.assert_close(together[row], alone.values("x"))


def test_a_solver_finds_the_penalized_solution() -> None:
    problem = Quadratic(m=2, n=4, kappa=3.0)
    forms = problem.forms
    solver = ScaleBiO(penalty=50.0, lr_x=0.2, lr_z=0.9, lower_steps=2, **PLAIN)
    result = fit(problem, solver, TorchBackend(device="cpu"), steps=150)
    torch.testing.assert_close(result.x["value"], forms.solution() + forms.penalized_shift(50.0), rtol=1e-6, atol=1e-6)
    assert result.history[-1].upper["gradient"] == pytest.approx(float(forms.grad_phi(result.x["value"]).norm()), rel=1e-6)


def test_the_reference_hypergradient_agrees_with_the_closed_form_also_by_conjugate_gradients() -> None:
    problem = Quadratic(rho=1.0)
    exact = problem.forms.grad_phi(problem.start_x)
    for dense in (0, 100):
        torch.testing.assert_close(hypergradient(problem, dense=dense).value["value"], exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [({"kappa": 0.5}, "kappa must be at least 1"), ({"n": 8, "split": 3}, "must divide n"), ({"m": 0}, "at least 1")],
)
def test_settings_that_make_no_problem_are_refused(settings: dict[str, float], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Quadratic(**settings)  # type: ignore[arg-type]
