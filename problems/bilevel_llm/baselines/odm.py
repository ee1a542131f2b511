"""ODM: Albalak et al., "Efficient Online Data Mixing For Language Model Pre-Training" (2023, arXiv 2312.02406).

    i ~ π_t;   L: mean loss over the tokens of a batch of source i;   a training step on L
    R_i <- β R_i + (1 - β) L / π_t(i)                                  (the others keep theirs)
    π_{t+1}(i) = (1 - k ε_{t+1}) exp(ε_t R_i) / Σ_j exp(ε_t R_j) + ε_{t+1},   ε_t = min(1/k, √(ln k / (k t)))

An Exp3 bandit whose reward is the training loss: what the model does worst, it sees more of. The mix changes while the model
trains; the fixed mix that stands for it is the mean of π over the steps.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from bilevel import Backend, Forward, InputError, Loss, Metrics, Problem, Shard, Solver, State, Stratified, Vector
from bilevel.data import Stream, generator
from bilevel.distribution import logits_of
from bilevel.optimizer import Optimizer
from bilevel.schedule import Schedule, at
from bilevel.solver import Workload
from bilevel.solvers.shared import require_positive
from bilevel_llm.baselines.base import Baseline, Outcome, Task, outcome_of_training
from bilevel_llm.baselines.learning import nothing_learned
from bilevel_llm.baselines.token_means import source_means
from bilevel_llm.baselines.training import LowerTraining, chosen_training
from bilevel_llm.data.batches import TokenBatch, micro_batches, per_token
from bilevel_llm.model.language_model import batch_logits
from bilevel_llm.model.token_losses import token_losses
from bilevel_llm.reweighting.problem import LLMReweighting

DRAW = 31
"""The stream of random numbers that picks the source of a step; see `bilevel.data.Stream`."""


@dataclass(frozen=True)
class ODM(Solver[State], Baseline):
    """Find weights by online data mixing. The validation data is not used.

    smoothing: β, the share of the old reward that is kept. 0.9, our choice: a memory of about ten draws of a source.
    lr: step size of the model. None takes that of the recipe's solver (`lr_z`), so that both methods train alike; 1e-5 where
        there is none.
    optimizer: the optimizer of the model. None takes that of the recipe's solver, and AdamW where there is none; in both
        cases the gradient's norm is clipped at 1, unless the recipe clips it elsewhere.

    The authors' scripts hold π at its start for the first 2% of the steps; here ε does, which keeps π uniform as long as
    √(ln k / (k t)) is above 1/k. x holds π of the next step; `average` in the records is the result.
    """

    smoothing: float = 0.9
    lr: Schedule | None = None
    optimizer: Optimizer | None = None

    resumable: ClassVar[bool] = True
    takes: ClassVar[type[Problem[Any]]] = LLMReweighting

    def __post_init__(self) -> None:
        if self.lr is not None:
            require_positive("lr", self.lr)
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must be at least 0 and below 1, not {self.smoothing}")

    def completed(self, solver: Callable[[], Solver[Any] | None]) -> Self:
        """With the step size and the optimizer of the recipe's solver, where its own are not given."""
        training = self._training(solver)
        return replace(self, lr=training.lr, optimizer=training.optimizer)

    def check(self, task: Task) -> None:
        """Check that the policy is free to move."""
        _check_problem(task.problem)

    def find(self, task: Task) -> Outcome:
        """Train the model, average the policy over the steps, and test whether the model has learned something."""
        result = task.train(self)
        notes = ["odm does not use the validation data: it trains more on sources with a larger loss"]
        return outcome_of_training(result, notes, nothing_learned("odm", "model", result.history, self._training().words))

    def init(self, problem: Problem[Any], backend: Backend) -> State:
        """Place the policy x and the model y."""
        if not isinstance(problem, LLMReweighting):
            raise InputError(f"odm draws batches of single sources, which {type(problem).__name__} does not have")
        _check_problem(problem)
        optimizer = self._training().optimizer
        x = backend.place("x", problem.upper, optimizer, sharded=False)
        y = backend.place("y", problem.lower, optimizer, sharded=True, blocks=problem.blocks)
        k = len(problem.sources)
        return State(x, {"y": y}, {"rewards": [0.0] * k, "drawn": [0] * k, "sum": [0.0] * k})

    def step(self, t: int, state: State, problem: Problem[Any], backend: Backend) -> Metrics:
        """Draw a source, train on a batch of it, and reward it with its loss."""
        assert isinstance(problem, LLMReweighting)
        x, y = state.x, state.replicas["y"]
        names = list(problem.source_tables)
        with torch.no_grad():
            π = x().double().cpu()
        source = int(generator(backend.shard.seed, DRAW, t).choice(len(names), p=(π / π.sum()).numpy()))
        batch, tokens = _batch(problem, source, state.memory["drawn"][source], backend.shard)
        loss = backend.backward(lambda b: _mean(y, b), batch, wrt={y: 1})
        norm = backend.step(y, lr=at(self._training().lr, t))

        rewards, drawn = list(state.memory["rewards"]), list(state.memory["drawn"])
        rewards[source] = self.smoothing * rewards[source] + (1 - self.smoothing) * loss.value / float(π[source])
        drawn[source] += 1
        total = [s + p for s, p in zip(state.memory["sum"], π.tolist(), strict=True)]
        state.memory = {"rewards": rewards, "drawn": drawn, "sum": total}
        old = backend.read(x)
        ((name, logits),) = old.parts.items()
        following = policy(torch.tensor(rewards, dtype=torch.float64), t + 1)
        backend.write(x, Vector({name: logits_of(following, 0.0).to(logits)}, old.whole))
        return {
            "lower_loss": loss.value,
            "lower_parts": {names[source]: loss.value},
            "grad_norm": norm,
            "average": dict(zip(names, [s / (t + 1) for s in total], strict=True)),
            "tokens": tokens,
            "backward_tokens": tokens,
        }

    def workload(self) -> Workload:
        """One model takes one pass."""
        return Workload({"y": self._training().optimizer}, lower_passes=1)

    def _training(self, solver: Callable[[], Solver[Any] | None] = lambda: None) -> LowerTraining:
        return chosen_training("odm", self.lr, self.optimizer, solver, clip=1.0)


def policy(rewards: Tensor, t: int) -> Tensor:
    """π_t, from the rewards after t steps. Shape: (k,) -> (k,)."""
    k = len(rewards)
    ε = exploration(k, t)
    return (1 - k * ε) * torch.softmax(exploration(k, t - 1) * rewards, 0) + ε


def exploration(k: int, t: int) -> float:
    """ε_t, for k sources."""
    return min(1 / k, math.sqrt(math.log(k) / (k * t))) if t else 1 / k


def _batch(problem: LLMReweighting, source: int, index: int, shard: Shard) -> tuple[Sequence[TokenBatch], int]:
    """Batch number `index` of one source alone, weighted per token, and its number of tokens over all processes."""
    table = list(problem.source_tables.values())[source]
    sampler = Stratified((len(table),), problem.batch_size, Stream.LOWER)
    rows = sampler.batch(index, shard.seed)
    tokens = sum(len(table.row(row)[0]) for _, row in rows)
    batches = micro_batches([table], sampler, index, shard, packed=problem.packed)
    return per_token(batches, [table], rows), tokens


def _mean(model: Forward, batch: TokenBatch) -> Loss:
    return source_means(token_losses(batch_logits(model, batch), batch.targets), batch).sum()


def _check_problem(problem: LLMReweighting) -> None:
    if problem.floor or problem.initial != "uniform":
        raise InputError(
            "odm starts from uniform weights and keeps every source alive by itself; leave out problem.initial and .floor"
        )
