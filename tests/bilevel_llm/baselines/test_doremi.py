"""DoReMi against the paper's Algorithm 1, written out in numpy and plain torch."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bilevel import LISA, SGD, InputError, fit
from bilevel.run_reader import read_run
from bilevel_backends.torch_backend import TorchBackend
from bilevel_llm.baselines.base import Task
from bilevel_llm.baselines.doremi import DoReMi
from bilevel_llm.reweighting.problem import LLMReweighting
from bilevel_problems.quadratic import Quadratic

Make = Callable[..., Task]
PLAIN = DoReMi(lr=0.5, optimizer=SGD(), eta=3.0, smoothing=0.05, reference_steps=2)  # large, so that all terms show


def token_losses_by_source(model: Any, problem: LLMReweighting, t: int, seed: int) -> list[Tensor]:
    """Losses of all labelled tokens of batch t, source by source, one row at a time."""
    tables = list(problem.source_tables.values())
    losses: list[list[Tensor]] = [[] for _ in tables]
    for source, row in problem.lower_rows(t, seed):
        ids, labels = (torch.from_numpy(part.copy()) for part in tables[source].row(row))
        logits = model.model(input_ids=ids[None].long()).logits[0]
        losses[source].append(F.cross_entropy(logits[:-1], ids[1:].long(), reduction="none")[labels[1:]])
    return [torch.cat(parts) for parts in losses]


def algorithm_1(
    problem: LLMReweighting, solver: DoReMi, steps: int, seed: int, start: list[float]
) -> tuple[np.ndarray, np.ndarray]:
    """The weights of every proxy step, and their mean."""
    reference, proxy = problem.lower(), problem.lower()
    α = np.array(start)

    def train(model: Any, t: int, weights: np.ndarray) -> None:
        model.zero_grad()
        losses = token_losses_by_source(model, problem, t, seed)
        sum(w * loss.mean() for w, loss in zip(weights, losses, strict=True)).backward()  # type: ignore[union-attr]
        with torch.no_grad():
            for p in model.parameters():
                p -= solver.lr * p.grad

    for t in range(solver.reference_steps):  # type: ignore[arg-type]
        train(reference, t, α)
    taken = []
    for t in range(solver.reference_steps, steps):  # type: ignore[arg-type]
        with torch.no_grad():
            of_proxy = token_losses_by_source(proxy, problem, t, seed)
            of_reference = token_losses_by_source(reference, problem, t, seed)
        λ = np.array([np.maximum(p.numpy() - r.numpy(), 0).mean() for p, r in zip(of_proxy, of_reference, strict=True)])
        α = α * np.exp(solver.eta * λ)
        α = (1 - solver.smoothing) * α / α.sum() + solver.smoothing / len(α)
        taken.append(α)
        train(proxy, t, α)
    return np.array(taken), np.mean(taken, axis=0)


@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_the_steps_are_those_of_algorithm_1(task: Make, micro_batch_size: int | None) -> None:
    """1e-5: float32 losses, summed in another order, over five steps. The batch of 10 gives sources unequal shares."""
    t = task(initial={"clean": 0.5, "other": 0.3, "noise": 0.2})
    expected, mean = algorithm_1(t.problem, PLAIN, 5, 7, [0.5, 0.3, 0.2])
    history = fit(t.problem, PLAIN, TorchBackend(device="cpu", micro_batch_size=micro_batch_size), steps=5, seed=7).history
    found = np.array([list(record.upper.values()) for record in history])
    np.testing.assert_allclose(found[:2], [[0.5, 0.3, 0.2]] * 2, rtol=1e-12)  # held while the reference is trained
    np.testing.assert_allclose(found[2:], expected, rtol=1e-5)
    np.testing.assert_allclose(list(history[-1].average.values()), mean, rtol=1e-5)
    assert np.abs(expected[-1] - [0.5, 0.3, 0.2]).max() > 0.01  # they moved at all


def test_as_a_baseline_it_gives_the_average_and_its_cost(task: Make) -> None:
    t = task(steps=6, seed=3)
    outcome = DoReMi(lr=0.1).find(t)
    history = fit(t.problem, DoReMi(lr=0.1, reference_steps=3), TorchBackend(device="cpu"), steps=6, seed=3).history
    assert outcome.weights == history[-1].average
    assert outcome.weights == {k: pytest.approx(np.mean([r.upper[k] for r in history[3:]])) for k in outcome.weights}
    tables = list(t.problem.source_tables.values())
    tokens = [sum(len(tables[s].row(row)[0]) for s, row in t.problem.lower_rows(i, 3)) for i in range(6)]
    assert outcome.cost.backward_tokens == sum(tokens) == sum(record.size for record in history)
    assert outcome.cost.tokens == sum(tokens[:3]) + 3 * sum(tokens[3:])  # the proxy's steps: z, y and y again
    assert outcome.cost.seconds > 0


def test_a_resumed_run_goes_on_bit_for_bit(task: Make, tmp_path: Path) -> None:
    t, solver = task(), DoReMi(lr=1e-2, reference_steps=2)

    def run(steps: int, output: str, *, resume: bool = False) -> Any:
        where = tmp_path / output
        return fit(
            t.problem,
            solver,
            TorchBackend(),
            steps=steps,
            seed=5,
            active=LISA(blocks=1, period=2),
            output=where,
            resume=resume,
        )

    whole = run(6, "whole")
    for steps in (1, 2, 4, 6):  # within the reference's steps, between, and within the proxy's
        parts = run(steps, "parts", resume=steps > 1)
    timeless = [[dataclasses.replace(record, seconds=0.0) for record in r.history] for r in (whole, parts)]
    assert timeless[0] == timeless[1]
    assert torch.equal(whole.x["logits"], parts.x["logits"])
    weights = json.loads((tmp_path / "parts" / "weights.json").read_text())
    assert weights["average"] == whole.history[-1].average
    assert weights["findings"][0]["name"] == "not-tested"
    assert read_run(tmp_path / "parts").average == weights["average"], "the report and weights.json differ"


def test_the_weights_never_leave_the_smoothed_simplex() -> None:
    solver = DoReMi(eta=1.0, smoothing=0.3)
    moved = solver.moved(
        torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64), torch.tensor([900.0, 0.0, 1.0], dtype=torch.float64)
    )
    torch.testing.assert_close(moved, torch.tensor([0.8, 0.1, 0.1], dtype=torch.float64))


def test_what_it_cannot_do_is_said_first(task: Make) -> None:
    with pytest.raises(InputError, match="leaves none for the proxy"):
        DoReMi(reference_steps=6).check(task(steps=6))
    with pytest.raises(InputError, match=r"set problem\.floor=0"):
        DoReMi().check(task(floor=0.01))
    with pytest.raises(InputError, match="Quadratic does not give"):
        fit(Quadratic(m=2, n=2), dataclasses.replace(PLAIN), TorchBackend(), steps=1)
    with pytest.raises(InputError, match="reference_steps is missing"):
        fit(task().problem, DoReMi(), TorchBackend(), steps=1)
    for bad in ({"eta": 0}, {"smoothing": 1.0}, {"reference_steps": 0}, {"lr": 0.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            DoReMi(**bad)  # type: ignore[arg-type]
