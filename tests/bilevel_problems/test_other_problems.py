import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from bilevel import SGD, InputError, Problem, ScaleBiO, Shard, fit
from bilevel.config import load_config
from bilevel.plugins import Plugins
from bilevel.testing.contract import check_problem
from bilevel.testing.hypergradient import hypergradient
from bilevel_backends.torch_backend import TorchBackend
from bilevel_problems.cubic_bias import CubicBias
from bilevel_problems.hyper_cleaning import HyperCleaning
from bilevel_problems.logistic_regularization import LogisticRegularization
from bilevel_problems.ridge_reweighting import RidgeReweighting
from bilevel_problems.tables import Rows

PLAIN = {"optimizer_x": SGD(), "optimizer_z": SGD(), "warmup": 0}


@pytest.mark.parametrize(
    "problem",
    [
        CubicBias(),
        LogisticRegularization(),
        LogisticRegularization(batch_size=7),
        RidgeReweighting(),
        RidgeReweighting(batch_size=11),
        HyperCleaning(rows=60, validation_rows=30),
        HyperCleaning(rows=60, validation_rows=30, batch_size=16),
    ],
    ids=lambda p: f"{type(p).__name__}-{getattr(p, 'batch_size', None)}",
)
def test_it_keeps_the_contract_of_a_problem(problem: Problem) -> None:  # type: ignore[type-arg]
    check_problem(problem, tolerance=1e-9)


def test_a_batch_of_all_rows_is_made_once_for_each_way_to_divide_it() -> None:
    problem = RidgeReweighting()
    whole, cut = Shard(), Shard(micro_batch_size=50)
    assert problem.lower_batch(3, whole) is problem.lower_batch(0, whole)
    assert [rows.size for rows in problem.lower_batch(0, cut)] == [50, 50, 50, 50]
    assert [rows.size for rows in problem.lower_batch(0, whole)] == [200]
    assert problem.upper_batch(0, whole)[0].size == problem.validation_rows


def test_minibatch_gradients_of_ridge_reweighting_are_unbiased() -> None:
    problem = RidgeReweighting(rows=6, validation_rows=6, batch_size=10)
    x, y = problem.upper(), problem.lower()
    y.value.data += 1  # type: ignore[union-attr, operator]

    def loss(batches: Sequence[Rows]) -> float:
        return float(sum(problem.lower_loss(x, y, batch)[0].detach() for batch in batches))

    # three batches of two rows each walk through all six rows of every source
    mean = sum(loss(problem.lower_batch(index, Shard())) for index in range(3)) / 3
    whole = RidgeReweighting(rows=6, validation_rows=6)
    assert mean == pytest.approx(loss(whole.lower_batch(0, Shard())), rel=1e-12)


def test_the_closed_forms_of_ridge_reweighting_are_those_of_its_losses() -> None:
    problem = RidgeReweighting()
    x = torch.linspace(-1, 1, 5, dtype=torch.float64)
    answer = hypergradient(problem, x={"logits": x})
    torch.testing.assert_close(answer.y["value"], problem.lower_solution(x))
    torch.testing.assert_close(answer.value["logits"], torch.func.grad(problem.phi)(x))


def test_scalebio_gives_flipped_sources_no_weight() -> None:
    solver = ScaleBiO(penalty=100.0, lr_x=2.0, lr_z=0.3, lower_steps=2, **PLAIN)
    last = fit(RidgeReweighting(), solver, TorchBackend(device="cpu"), steps=150).history[-1]
    assert last.upper["flipped-0"] + last.upper["flipped-1"] < 0.01
    assert set(last.parts["gap_parts"]) == {"clean-0", "clean-1", "clean-2", "flipped-0", "flipped-1"}


def test_hyper_cleaning_tells_wrong_labels_from_right_ones() -> None:
    problem = HyperCleaning(rows=200, validation_rows=100)
    solver = ScaleBiO(penalty=100.0, lr_x=50.0, lr_z=1.0, **PLAIN)
    last = fit(problem, solver, TorchBackend(device="cpu"), steps=300).history[-1]
    assert last.upper["right"] > 0.7
    assert last.upper["wrong"] < 0.3


def test_wrong_labels_are_as_many_as_asked_for_and_really_wrong() -> None:
    clean, noisy = HyperCleaning(rows=100, wrong=0.0), HyperCleaning(rows=100, wrong=0.3)
    changed = clean.training.targets != noisy.training.targets
    assert int(changed.sum()) == 30
    assert torch.equal(changed, noisy.is_wrong)


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(InputError, match=r"bilevel\[synthetic\]"):
        HyperCleaning().prepare()


def test_more_rows_than_there_are_digits_are_refused() -> None:
    with pytest.raises(InputError, match="more than the 1797 digits"):
        HyperCleaning(rows=1700, validation_rows=200).prepare()


@pytest.mark.parametrize("mu", [0.5, 0.01])
def test_the_bias_of_cubic_bias_tends_to_an_eighth_of_kappa_cubed(mu: float) -> None:
    problem, x = CubicBias(mu=mu), CubicBias(mu=mu).slope(torch.tensor([mu], dtype=torch.float64))
    penalty = 1e4 / mu**2
    gradient = x + penalty * (problem.lower_solution(x) - problem.penalized_solution(x, penalty))
    # the next term is smaller by 1 / (penalty mu²) = 1e-4
    assert penalty * float(gradient - problem.grad_phi(x)) == pytest.approx(1 / (8 * mu**3), rel=1e-3)


def test_the_lower_solution_of_cubic_bias_is_found_on_both_sides() -> None:
    problem = CubicBias(mu=0.1)
    x = torch.tensor([-3.0, -0.01, 0.0, 1e-6, 0.5, 40.0], dtype=torch.float64)
    torch.testing.assert_close(problem.slope(problem.lower_solution(x)), x, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    "name", ["quadratic", "cubic-bias", "logistic-regularization", "ridge-reweighting", "hyper-cleaning"]
)
def test_a_recipe_can_name_it(name: str, tmp_path: Path, plugins: Plugins) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"problem: {{name: {name}}}\n"
        "solver: {name: scalebio, penalty: 20, lr_x: 0.01, lr_z: 0.1, warmup: 0,"
        " optimizer_x: {name: sgd}, optimizer_z: {name: sgd}}\n"
        f"backend: {{name: torch, device: cpu}}\nrun: {{steps: 3, output: {tmp_path / 'run'}}}\n"
    )
    history = load_config(recipe, plugins).fit().history
    assert history[-1].upper
