"""Online data mixing against the paper's update, written out with plain numbers."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bilevel import SGD, InputError, Stratified, fit
from bilevel.data import Stream
from bilevel_backends.torch_backend import TorchBackend
from bilevel_llm.baselines.base import Task
from bilevel_llm.baselines.odm import ODM, exploration, policy

Make = Callable[..., Task]


def test_the_policy_is_that_of_the_paper() -> None:
    rewards, k, t = [3.0, 8.0, 5.0, 1.0], 4, 50
    ε, before = math.sqrt(math.log(k) / (k * t)), math.sqrt(math.log(k) / (k * (t - 1)))
    powers = [math.exp(before * r) for r in rewards]
    expected = [(1 - k * ε) * p / sum(powers) + ε for p in powers]
    assert policy(torch.tensor(rewards, dtype=torch.float64), t).tolist() == pytest.approx(expected, rel=1e-12)
    assert sum(expected) == pytest.approx(1)


def test_it_explores_uniformly_at_first() -> None:
    assert exploration(4, 0) == exploration(4, 5) == 0.25
    assert exploration(4, 6) < 0.25
    assert policy(torch.tensor([0.0, 90.0, 0.0, 0.0], dtype=torch.float64), 5).tolist() == pytest.approx([0.25] * 4)


def test_a_step_trains_on_one_source_and_rewards_it_with_its_token_mean(task: Make) -> None:
    """The loss before the first step: one row at a time through the plain model, over all tokens of the batch."""
    t = task()
    record = fit(
        t.problem, ODM(lr=0.1, optimizer=SGD()), TorchBackend(device="cpu", micro_batch_size=3), steps=1, seed=2
    ).history[0]
    ((name, value),) = record.parts["lower_parts"].items()
    table = t.problem.source_tables[name]
    rows = [row for _, row in Stratified((len(table),), 10, Stream.LOWER).batch(0, 2)]
    model = t.problem.lower().model
    losses = []
    for row in rows:
        ids, labels = (torch.from_numpy(part.copy()) for part in table.row(row))
        with torch.no_grad():
            logits = model(input_ids=ids[None].long()).logits[0]  # type: ignore[operator]
        losses.append(F.cross_entropy(logits[:-1], ids[1:].long(), reduction="none")[labels[1:]])
    assert value == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)
    assert record.metrics["tokens"] == record.size == sum(len(table.row(row)[0]) for row in rows)


def test_rewards_are_a_moving_average_of_losses_over_probabilities(task: Make) -> None:
    t = task()
    history = fit(t.problem, ODM(lr=0.05, smoothing=0.6), TorchBackend(device="cpu"), steps=12, seed=1).history
    names, rewards, π = list(t.problem.source_tables), dict.fromkeys(t.problem.source_tables, 0.0), [1 / 3] * 3
    policies = []
    for step, record in enumerate(history, start=1):
        policies.append(π)
        ((name, loss),) = record.parts["lower_parts"].items()
        rewards[name] = 0.6 * rewards[name] + 0.4 * loss / π[names.index(name)]
        π = policy(torch.tensor(list(rewards.values()), dtype=torch.float64), step).tolist()
        assert list(record.upper.values()) == pytest.approx(π, rel=1e-9)
    assert list(history[-1].average.values()) == pytest.approx(np.mean(policies, axis=0), rel=1e-9)
    assert max(π) - min(π) > 0.05
    assert {next(iter(record.parts["lower_parts"])) for record in history} == set(names)


def test_a_resumed_run_goes_on_bit_for_bit(task: Make, tmp_path: Path) -> None:
    t = task()

    def run(steps: int, output: str, *, resume: bool = False) -> Any:
        return fit(t.problem, ODM(lr=1e-2), TorchBackend(), steps=steps, seed=5, output=tmp_path / output, resume=resume)

    whole = run(7, "whole")
    for steps in (3, 5, 7):
        parts = run(steps, "parts", resume=steps > 3)
    timeless = [[replace(record, seconds=0.0) for record in r.history] for r in (whole, parts)]
    assert timeless[0] == timeless[1]


def test_what_it_cannot_do_is_said_first(task: Make) -> None:
    with pytest.raises(InputError, match=r"leave out problem\.initial and \.floor"):
        ODM().check(task(initial="size"))
    for bad in ({"smoothing": 1.0}, {"smoothing": -0.1}, {"lr": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            ODM(**bad)  # type: ignore[arg-type]
