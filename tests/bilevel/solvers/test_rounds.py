"""The solver that goes in rounds: its signal is a derivative, its answer the optimum, and a round begins where it should."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bilevel import LISA, SGD, AdamW, InputError, Rounds, ScaleBiO, fit
from bilevel.testing.session import Session
from bilevel_backends.torch_backend import TorchBackend
from bilevel_problems.dialects import Dialects
from bilevel_problems.quadratic import Quadratic
from bilevel_problems.ridge_reweighting import RidgeReweighting
from bilevel_problems.variables import ParameterVector
from tests.bilevel_llm.conftest import data, model_directory, problem  # noqa: F401 (fixtures)

QUICK = Rounds(horizon=40, lr_z=0.02)


class AtTheOptimum(RidgeReweighting):
    """Starts y at y*(x): its gradient, and with it what moves z, is then the same at every step."""

    def lower(self) -> nn.Module:
        return ParameterVector(self.lower_solution(torch.zeros(len(self.names), dtype=torch.float64)))


@pytest.mark.parametrize("horizon", [2, 5, 40])
def test_the_signal_is_minus_the_derivative_of_the_loss_after_that_much_training(horizon: int) -> None:
    """Against finite differences of Φ_k, k = 1..K-1, averaged as the signals are. The penalty's bias is of order 1e-6."""
    ridge, lr = AtTheOptimum(), 0.05
    start = ridge.lower_solution(torch.zeros(5, dtype=torch.float64))
    solver = Rounds(horizon=horizon, penalty=1e6, lr_z=lr, optimizer_z=SGD())

    def phi(q: np.ndarray[Any, Any], steps: int) -> float:
        weights, y = torch.from_numpy(q), start.clone()
        for _ in range(steps):
            y.requires_grad_(True)
            (slope,) = torch.autograd.grad(weights @ ridge.source_losses(y) + 0.5 * ridge.ridge * (y**2).sum(), y)
            y = (y - lr * slope).detach()
        v = ridge.validation
        return float(0.5 * ((v.features @ y - v.targets) ** 2).mean())

    h, uniform = 1e-4, np.full(5, 0.2)
    expected = np.zeros(5)
    for i in range(5):
        step = h * (np.eye(5)[i] - uniform)  # within the simplex
        for k in range(1, horizon):
            slope = (phi(uniform + step, k) - phi(uniform - step, k)) / (2 * h)
            expected[i] -= solver.weight(k) * slope
    signal = np.array(list(fit(ridge, solver, TorchBackend(), steps=horizon).history[-1].parts["signal"].values()))
    assert signal - signal.mean() == pytest.approx(expected - expected.mean(), rel=1e-4, abs=1e-7)


def test_the_weights_of_the_steps_sum_to_one_and_grow() -> None:
    weights = [QUICK.weight(k) for k in range(QUICK.horizon)]
    assert sum(weights) == pytest.approx(1.0)
    assert weights[0] == 0.0
    assert weights == sorted(weights)


def test_the_answer_is_the_mix_of_the_target_where_a_single_loop_passes_it() -> None:
    """The best mix for 40 steps is within 0.05 of the target's (`make study`); a fast x ends 0.2 or more from it."""
    share = 0.7
    dialects = Dialects(target=[share, 1 - share], instance=1)
    answer = fit(dialects, QUICK, TorchBackend(), steps=240).history[-1].upper
    assert answer["mix-0"] == pytest.approx(share, abs=0.09)
    assert answer["noise-0"] < 0.02
    single = fit(dialects, ScaleBiO(lr_z=5e-3, warmup=50), TorchBackend(), steps=300).history[-1].upper
    assert abs(single["mix-0"] - share) > 0.2


def test_the_order_of_the_sources_does_not_matter() -> None:
    mixes = [[1.0, 0.0], [0.0, 1.0]]
    here = Dialects(mixes=mixes, noise=0, rows=400)
    there = Dialects(mixes=mixes[::-1], noise=0, rows=400)
    there.__dict__["training"] = here.training.flip(0)  # the same rows
    a, b = (fit(p, QUICK, TorchBackend(), steps=240).history[-1].upper for p in (here, there))
    assert a["mix-0"] == pytest.approx(b["mix-1"], abs=0.03)  # other draws: the rows of a stratum depend on its number


def test_the_answer_does_not_depend_on_the_trust_region() -> None:
    from dataclasses import replace

    plain, other = (
        fit(Dialects(instance=2), solver, TorchBackend(), steps=320).history[-1].upper
        for solver in (QUICK, replace(QUICK, trust=2.0))
    )
    assert other["mix-0"] == pytest.approx(plain["mix-0"], abs=0.03)


def test_a_round_begins_at_the_same_weights_and_sees_rows_of_its_own() -> None:
    dialects = Dialects(rows=160)
    seen: list[set[tuple[int, ...]]] = []
    draw = dialects.lower_batch

    def noting(index: int, shard: Any) -> Any:
        batches = draw(index, shard)
        if shard.fold is not None:
            if index % 4 == 0:
                seen.append(set())
            seen[-1] |= {tuple(row.tolist()) for batch in batches for row in batch.ids}
        return batches

    dialects.lower_batch = noting  # type: ignore[method-assign]
    solver = Rounds(horizon=4, lr_z=0.1, folds=4)
    with Session(dialects, solver, TorchBackend()) as session:
        start = session.values("z").clone()
        session.step(4)
        assert not torch.equal(session.values("z"), start)
        session.step(1)
        one_step = session.values("z")
        assert float((one_step - start).abs().max()) <= 0.1 * (1 + 1e-6)  # AdamW's first step, at most lr
        session.step(11)
    assert len(seen) == 4
    assert all(not (seen[i] & seen[j]) for i in range(4) for j in range(i))


def test_a_resumed_run_goes_on_bit_for_bit_within_a_round_and_across_one(
    problem: Callable[..., Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    """A language model with layers that take turns: what a round rewinds was active earlier in it."""

    def run(steps: int, output: str, *, resume: bool = False) -> Any:
        return fit(
            problem(),
            Rounds(horizon=5, lr_z=1e-3, folds=2, optimizer_z=AdamW()),
            TorchBackend(),
            steps=steps,
            seed=3,
            active=LISA(blocks=1, period=2),
            output=tmp_path / output,
            resume=resume,
        )

    whole = run(14, "whole")
    for steps in (3, 7, 14):
        parts = run(steps, "parts", resume=steps > 3)
    assert torch.equal(whole.x["logits"], parts.x["logits"])
    assert [r.metrics for r in whole.history] == [r.metrics for r in parts.history]


def test_every_round_of_a_model_trained_in_parts_starts_from_the_model(problem: Callable[..., Any]) -> None:  # noqa: F811
    """In bfloat16, where masters are rounded into the parameters: what comes back is the start bit for bit."""
    solver = Rounds(horizon=4, lr_z=1e-2, folds=2)
    with Session(problem(), solver, TorchBackend(dtype="bfloat16"), active=LISA(blocks=1, period=1)) as session:
        start = session.backend.weights(session.state.replicas["z"])
        session.step(4)
        moved = session.backend.weights(session.state.replicas["z"])
        assert any(not torch.equal(start[name], moved[name]) for name in start)
        session.backend.rewind(session.state.replicas["z"])
        back = session.backend.weights(session.state.replicas["z"])
    assert all(torch.equal(start[name], back[name]) for name in start)


def test_an_upper_variable_that_is_no_distribution_is_refused() -> None:
    with pytest.raises(InputError, match=r"needs an upper variable that is a `bilevel.Distribution`.*not a ParameterVector"):
        fit(Quadratic(), Rounds(), TorchBackend(), steps=1)


@pytest.mark.parametrize("wrong", [{"horizon": 1}, {"folds": 1}, {"trust": 0.0}, {"penalty": -1.0}, {"pull": -0.1}])
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Rounds(**wrong)


def test_more_folds_than_rows_are_refused_with_what_to_do() -> None:
    with pytest.raises(InputError, match=r"20 rows cannot be dealt into 30 folds; add rows, or use fewer folds"):
        fit(Dialects(rows=20, batch_size=6), Rounds(folds=30), TorchBackend(), steps=1)
