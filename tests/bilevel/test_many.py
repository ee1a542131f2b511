from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bilevel import (
    AID,
    BOME,
    F2BA,
    F2SA,
    F3SA,
    MEHA,
    PBGD,
    SGD,
    SOBA,
    AdamW,
    Descent,
    F2SAp,
    InputError,
    Power,
    Problem,
    ScaleBiO,
    Solver,
    fit,
    fit_many,
)  # fmt: skip
from bilevel.problem import Forward
from bilevel.solvers.scalebio import Flattening
from bilevel_backends.deepspeed_backend import DeepSpeedBackend
from bilevel_backends.torch_backend import TorchBackend
from bilevel_problems.dialects import Dialects
from bilevel_problems.logistic_regularization import LogisticRegularization
from bilevel_problems.quadratic import Quadratic
from bilevel_problems.ridge_reweighting import RidgeReweighting
from bilevel_theory.nonconvex_rate import SlowTail

STEPS, SEEDS = 4, (3, 5)
EXACT = 1e-11  # relative; the same operations in float64, summed in other orders

SOLVERS: dict[str, Solver[Any]] = {
    "f2sa": F2SA(lower_steps=2),
    "f2ba": F2BA(lower_steps=2),
    "f2sa-p": F2SAp(p=3, lower_steps=2, normalized=True),
    "pbgd": PBGD(lower_steps=2),
    "pbgd, gradient norm": PBGD(kind="gradient-norm"),
    "scalebio, AdamW and a warm-up": ScaleBiO(warmup=2, lr_z=0.01),
    "bome": BOME(lower_steps=2),
    "meha": MEHA(),
    "f3sa": F3SA(),
    "soba": SOBA(),
    "aid, five products": AID(lower_steps=2, cg_steps=5, cg_tolerance=None),
    "descent with momentum, decay and clipping": Descent(lr=0.1, optimizer=SGD(momentum=0.9, weight_decay=0.1, clip=0.5)),
    "f2sa, AdamW with decay": F2SA(optimizer_z=AdamW(weight_decay=0.1, clip=0.5), optimizer_x=AdamW()),
}
PROBLEMS: dict[str, Problem[Any]] = {
    "noise": Quadratic(kappa=3.0, upper_noise=0.1, lower_noise=0.1, batch_size=2, split=2),
    "minibatches": RidgeReweighting(batch_size=20),
    "named parts": Dialects(),
}


def backend() -> TorchBackend:
    return TorchBackend(device="cpu")


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_each_run_ends_where_fit_ends(solver: str, problem: str) -> None:
    found = fit_many(PROBLEMS[problem], SOLVERS[solver], backend(), steps=STEPS, seeds=SEEDS)
    for k, seed in enumerate(SEEDS):
        alone = fit(PROBLEMS[problem], SOLVERS[solver], backend(), steps=STEPS, seed=seed)
        for name, value in alone.x.items():
            torch.testing.assert_close(found.x[name][0, k], value, rtol=EXACT, atol=EXACT)
        for record in alone.history:
            for name, number in record.metrics.items():
                assert float(found.metrics[name][0, k, record.step]) == pytest.approx(number, rel=1e-9, abs=1e-12)


def test_each_run_has_its_own_step_sizes_and_penalty() -> None:
    solvers = [F2SA(lr_x=0.01), F2SA(lr_x=0.02, penalty=5.0), F2SA(lr_x=Power(0.1, -0.5), lr_z=0.05)]
    problem = RidgeReweighting(batch_size=20)
    found = fit_many(problem, solvers, backend(), steps=STEPS, seeds=SEEDS, record_every=3)
    assert list(found.steps) == [2, 3]
    assert found.trajectory["logits"].shape == (3, 2, 2, 5)
    for i, solver in enumerate(solvers):
        for k, seed in enumerate(SEEDS):
            alone = fit(problem, solver, backend(), steps=STEPS, seed=seed)
            torch.testing.assert_close(found.x["logits"][i, k], alone.x["logits"], rtol=EXACT, atol=EXACT)
            torch.testing.assert_close(found.trajectory["logits"][i, k, -1], alone.x["logits"], rtol=EXACT, atol=EXACT)


def test_a_setting_that_is_a_real_number_may_differ() -> None:
    problem, solvers = Quadratic(), [MEHA(gamma=1), MEHA(gamma=0.5)]
    found = fit_many(problem, solvers, backend(), steps=STEPS)
    for i, solver in enumerate(solvers):
        alone = fit(problem, solver, backend(), steps=STEPS)
        torch.testing.assert_close(found.x["value"][i, 0], alone.x["value"], rtol=EXACT, atol=EXACT)


def test_the_whole_data_are_one_batch_for_all_runs() -> None:
    problem = LogisticRegularization(rows=40, d=5)
    solvers = [F2BA(lr_x=0.1 * k, lower_steps=2) for k in range(1, 4)]
    found = fit_many(problem, solvers, backend(), steps=12)
    alone = fit(problem, solvers[2], backend(), steps=12)
    torch.testing.assert_close(found.x["value"][2, 0], alone.x["value"], rtol=EXACT, atol=EXACT)


class Layer(SlowTail):
    """A problem whose lower variable is a layer, in the precision of the backend."""

    def lower(self) -> nn.Module:
        return nn.Linear(3, 1)

    def upper_loss(self, x: Forward, y: Forward, batch: Tensor) -> Tensor:
        return (y(torch.ones(2, 3)) - 1).square().sum()

    def lower_loss(self, x: Forward, y: Forward, batch: Tensor) -> Tensor:
        return (y(torch.ones(2, 3)) - x()).square().sum()


def test_initial_values_are_those_of_each_seed_and_float32_is_kept() -> None:
    problem, solver = Layer(q=0.5), F2SA(lr_z=0.01)
    found = fit_many(problem, solver, backend(), steps=3, seeds=SEEDS)
    assert found.x["value"][0, 0] != found.x["value"][0, 1]
    for k, seed in enumerate(SEEDS):
        alone = fit(problem, solver, backend(), steps=3, seed=seed)
        torch.testing.assert_close(found.x["value"][0, k], alone.x["value"], rtol=1e-5, atol=1e-6)


def test_a_run_that_diverges_leaves_the_others_alone() -> None:
    problem, steps = Quadratic(), 60
    found = fit_many(
        problem, [F2BA(lr_x=1e9, lower_steps=2), F2BA(lr_x=0.01, lower_steps=2)], backend(), steps=steps, record_every=steps
    )
    alone = fit(problem, F2BA(lr_x=0.01, lower_steps=2), backend(), steps=steps)
    assert found.diverged.tolist() == [[True], [False]]
    assert bool(found.x["value"][0].isnan().all())
    torch.testing.assert_close(found.x["value"][1, 0], alone.x["value"], rtol=1e-9, atol=1e-9)


class Moody(Quadratic):
    """A problem whose loss depends on how often it was computed."""

    calls = 0

    def lower_loss(self, x: Forward, y: Forward, batch: Any) -> Tensor:
        self.calls += 1
        return super().lower_loss(x, y, batch) * (1 + 0.1 * self.calls)


class Branching(Quadratic):
    """A problem whose loss looks at values."""

    def lower_loss(self, x: Forward, y: Forward, batch: Any) -> Tensor:
        loss = super().lower_loss(x, y, batch)
        return loss if float(loss.detach()) > 0 else 2 * loss


class Uneven(Quadratic):
    """A problem whose batches have another size for every seed."""

    def lower_batch(self, index: int, shard: Any) -> Any:
        return [torch.zeros(shard.seed)]

    def lower_loss(self, x: Forward, y: Forward, batch: Any) -> Tensor:
        return y().square().sum() + batch.sum()


@dataclass(frozen=True)
class Undecided(F2SA):
    """A solver that takes another step where the loss is large."""

    def step(self, t: int, *rest: Any) -> Any:
        found = super().step(t, *rest)
        return found if found["upper_loss"] < found["lower_loss"] + 1.0 else super().step(t, *rest)


@pytest.mark.parametrize(
    ("problem", "solvers", "wrong"),
    [
        (Moody(), F2SA(), "Moody.lower_loss gives other numbers when it is called again"),
        (Branching(), F2SA(), "Branching.lower_loss cannot be computed for many runs at once"),
        (Uneven(), F2SA(), "the batches of different seeds of Uneven differ"),
        (Quadratic(), ScaleBiO(warmup=Flattening(2, 9)), "Flattening.over .scalebio.py, line .* asks for one number"),
        (Quadratic(), [F2SA(lower_steps=1), F2SA(lower_steps=2)], "F2SA: lower_steps differs between solvers .1, 2."),
        (Quadratic(), [F2SA(), F2BA()], "one class of solver, not F2SA, F2BA"),
        (Quadratic(), [], "nothing to run"),
        (
            Quadratic(upper_noise=9.0), [Undecided(lr_x=10.0**-k) for k in range(4)],
            "Undecided.step .test_many.py, line .* decides for all runs at once by numbers that do not agree",
        ),
    ],
)  # fmt: skip
def test_what_cannot_go_side_by_side_is_named(problem: Problem[Any], solvers: Any, wrong: str) -> None:
    with pytest.raises(InputError, match=wrong):
        fit_many(problem, solvers, backend(), steps=10, seeds=(1, 2))


def test_a_backend_that_holds_one_run_says_so() -> None:
    with pytest.raises(InputError, match="DeepSpeedBackend holds one run at a time"):
        fit_many(Quadratic(), F2SA(), DeepSpeedBackend(), steps=1)
    with pytest.raises(InputError, match="backend.compile is not for runs side by side"):
        fit_many(Quadratic(), F2SA(), TorchBackend(device="cpu", compile=True), steps=1)
    with pytest.raises(InputError, match="steps must be at least 1, not 0"):
        fit_many(Quadratic(), F2SA(), backend(), steps=0)
