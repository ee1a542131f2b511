"""DoReMi: Xie et al., "DoReMi: Optimizing Data Mixtures Speeds Up Language Model Pretraining" (NeurIPS 2023, 2305.10429).

    λ_i = mean over the tokens of source i of  max(ℓ_y - ℓ_z, 0)               (Algorithm 1; ℓ: loss of a token)
    α'_i = α_i exp(η λ_i),   α <- (1 - c) α' / Σ_j α'_j + c / k
    y <- a step on  Σ_i α_i · (mean over the tokens of source i of ℓ_y)

The reference z is trained first, on the mean losses weighted by the initial weights, and then stays fixed; the proxy y is
trained by group DRO from the same start. The result is the mean of α over the proxy's steps.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from bilevel import Backend, Forward, InputError, Loss, Metrics, Problem, Solver, State, Vector
from bilevel.distribution import logits_of
from bilevel.optimizer import Optimizer
from bilevel.schedule import Schedule, at
from bilevel.solver import Workload
from bilevel.solvers.shared import require_positive
from bilevel_llm.baselines.base import Baseline, Outcome, Task, outcome_of_training
from bilevel_llm.baselines.learning import nothing_learned
from bilevel_llm.baselines.token_means import batch_tokens, source_means, token_batches
from bilevel_llm.baselines.training import LowerTraining, chosen_training
from bilevel_llm.data.batches import TokenBatch
from bilevel_llm.data.constant import Constant
from bilevel_llm.model.language_model import batch_logits
from bilevel_llm.model.token_losses import token_losses
from bilevel_llm.reweighting.problem import LLMReweighting


@dataclass(frozen=True)
class DoReMi(Solver[State], Baseline):
    """Find weights that shrink the worst excess loss over a reference model. The validation data is not used.

    eta: η, the step size of the weights. 1, as in the paper.
    smoothing: c, the share of the uniform distribution that is mixed in at every step. 1e-3, as in the paper.
    reference_steps: steps that train the reference; the rest train the proxy. For the baseline, None means half of the
        steps, so that both models get the same number, as in the paper. The solver needs a number.
    lr: step size of both models. None takes that of the recipe's solver (`lr_z`), so that both methods train alike; 1e-5
        where there is none. The paper pretrains with 1e-3. A schedule begins anew for the proxy.
    optimizer: the optimizer of both models. None takes that of the recipe's solver, and AdamW where there is none; in both
        cases the gradient's norm is clipped at 1, as in the paper, unless the recipe clips it elsewhere.

    x holds α of the last step; `average` in the records is the result. A step of the proxy takes three forward
    passes (z, y for the excess, y for the step) and one backward pass, and is counted as such.
    """

    eta: float = 1.0
    smoothing: float = 1e-3
    reference_steps: int | None = None
    lr: Schedule | None = None
    optimizer: Optimizer | None = None

    resumable: ClassVar[bool] = True
    takes: ClassVar[type[Problem[Any]]] = LLMReweighting

    def __post_init__(self) -> None:
        require_positive("eta", self.eta)
        if self.lr is not None:
            require_positive("lr", self.lr)
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must be at least 0 and below 1, not {self.smoothing}")
        if self.reference_steps is not None and self.reference_steps < 1:
            raise ValueError(f"reference_steps must be at least 1, not {self.reference_steps}")

    def completed(self, solver: Callable[[], Solver[Any] | None]) -> Self:
        """With the step size and the optimizer of the recipe's solver, where its own are not given."""
        training = self._training(solver)
        return dataclasses.replace(self, lr=training.lr, optimizer=training.optimizer)

    def check(self, task: Task) -> None:
        """Both models need a step, and the weights must be free to move."""
        steps = self._reference_steps(task)
        if steps >= task.run.limit:
            raise InputError(
                f"doremi: {steps} of run.steps={task.run.limit} steps train the reference, which leaves none for the proxy; "
                "raise run.steps or lower baseline.reference_steps"
            )
        _check_floor(task.problem)

    def find(self, task: Task) -> Outcome:
        """Train the reference, then the proxy, and test whether both have learned something."""
        result = task.train(dataclasses.replace(self, reference_steps=self._reference_steps(task)))
        of_model = {
            "reference": [record for record in result.history if not record.moved],
            "proxy": [record for record in result.history if record.moved],
        }
        lr = self._training().words
        findings = [
            finding for model, history in of_model.items() for finding in nothing_learned("doremi", model, history, lr)
        ]
        notes = ["doremi does not use the validation data: its weights serve all sources alike"]
        return outcome_of_training(result, notes, findings)

    def init(self, problem: Problem[Any], backend: Backend) -> State:
        """Place x and the reference z, and the proxy y as its replica: both have the same start."""
        if not isinstance(problem, LLMReweighting):
            raise InputError(f"doremi needs the losses of single tokens, which {type(problem).__name__} does not give")
        if self.reference_steps is None:
            raise InputError("solver.reference_steps is missing: how many of the run's steps train the reference")
        _check_floor(problem)
        optimizer = self._training().optimizer
        x = backend.place("x", problem.upper, optimizer, sharded=False)
        z = backend.place("z", problem.lower, optimizer, sharded=True, blocks=problem.blocks)
        y = backend.replicate(z, "y")
        # kept here because a resumed run may have another number of steps, but not another boundary
        return State(x, {"z": z, "y": y}, {"reference_steps": self.reference_steps, "sum": [0.0] * len(problem.sources)})

    def step(self, t: int, state: State, problem: Problem[Any], backend: Backend) -> Metrics:
        """Take a step of the reference, or a step of the weights and then one of the proxy."""
        assert isinstance(problem, LLMReweighting)
        x, y, z = state.x, state.replicas["y"], state.replicas["z"]
        names = list(problem.source_tables)
        batch = token_batches(problem, t, backend.shard)
        tokens = batch_tokens(problem, t, backend.shard.seed)
        with torch.no_grad():
            α = x().double().cpu()

        reference = t < state.memory["reference_steps"]
        if not reference:
            excess = backend.evaluate(lambda b: _excess(y, z, b, names), batch).parts
            α = self.moved(α, torch.tensor([excess[name] for name in names], dtype=torch.float64))
            old = backend.read(x)
            ((name, logits),) = old.parts.items()
            backend.write(x, Vector({name: logits_of(α, 0.0).to(logits)}, old.whole))
            state.memory = {**state.memory, "sum": [s + a for s, a in zip(state.memory["sum"], α.tolist(), strict=True)]}
        model, weights = z if reference else y, Constant(α)
        lower = backend.backward(lambda b: _weighted(model, b, weights, names), batch, wrt={model: 1})
        norm = backend.step(model, lr=at(self._training().lr, t if reference else t - state.memory["reference_steps"]))

        total = sum(state.memory["sum"])  # of weights that sum to 1: the number of the proxy's steps
        average = [s / total for s in state.memory["sum"]] if total else α.tolist()
        return {
            "lower_loss": lower.value,
            "lower_parts": lower.parts,
            "grad_norm": norm,
            "average": dict(zip(names, average, strict=True)),
            "tokens": tokens if reference else 3 * tokens,
            "backward_tokens": tokens,
            **({"held": 1.0} if reference else {"excess_parts": excess}),
        }

    def workload(self) -> Workload:
        """The work of a proxy step: y and z go forward for the excess loss, then y takes a pass. The reference takes one."""
        return Workload(
            {name: self._training().optimizer for name in ("z", "y")}, lower_passes=1, lower_forwards=2, vectors=1
        )

    def moved(self, α: Tensor, excess: Tensor) -> Tensor:
        """The weights after an exponentiated-gradient step. Shapes: (k,), (k,) -> (k,)."""
        return (1 - self.smoothing) * torch.softmax(α.log() + self.eta * excess, 0) + self.smoothing / len(α)

    def _training(self, solver: Callable[[], Solver[Any] | None] = lambda: None) -> LowerTraining:
        return chosen_training("doremi", self.lr, self.optimizer, solver, clip=1.0)

    def _reference_steps(self, task: Task) -> int:
        return task.run.limit // 2 if self.reference_steps is None else self.reference_steps


def _excess(y: Forward, z: Forward, batch: TokenBatch, names: Sequence[str]) -> Loss:
    """λ: the excess loss is clipped for each token, then averaged."""
    losses = [token_losses(batch_logits(model, batch), batch.targets) for model in (y, z)]
    means = source_means((losses[0] - losses[1]).clamp_min(0), batch)
    return means.sum(), dict(zip(names, means, strict=True))


def _weighted(model: Forward, batch: TokenBatch, weights: Constant, names: Sequence[str]) -> Loss:
    means = source_means(token_losses(batch_logits(model, batch), batch.targets), batch)
    return torch.dot(weights.like(means), means), dict(zip(names, means.detach(), strict=True))


def _check_floor(problem: LLMReweighting) -> None:
    if problem.floor:
        raise InputError("doremi keeps every source alive by its own smoothing; set problem.floor=0")
