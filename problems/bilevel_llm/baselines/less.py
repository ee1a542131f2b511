"""LESS: Xia et al., "LESS: Selecting Influential Data for Targeted Instruction Tuning" (ICML 2024, arXiv 2402.04333).

    score(z) = max_j  mean over checkpoints of  mean over z' in validation set j of  cos(R'∇ℓ(z'), R'Γ(z))
    Γ(z) = m / (√v + ε),   m = (β1 m_t + (1 - β1) ∇ℓ(z)) / (1 - β1^(t+1)),   v = (β2 v_t + (1 - β2) ∇ℓ(z)²) / (1 - β2^(t+1))

A short warm-up trains LoRA adapters (Hu et al. 2021) with Adam and leaves its moments m_t, v_t. Γ(z) is the direction in
which Adam would step next on row z; ∇ℓ(z') the gradient of a validation row's loss; both are projected by a random R. The
paper's R is dense, ours a count sketch, whose cosines have the same mean and variance at a fraction of the work.
The rows with the highest scores are selected. As in the authors' code, each validation row contributes its own cosine.
The step size, by which the paper weights checkpoints, is constant here.

The warm-up is a run of `Descent` like any other, on the task's backend and with its rule for active blocks; the rows
are scored between its steps, on the model as the backend holds it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from bilevel import (
    Backend,
    Descent,
    Forward,
    InputError,
    Loss,
    Metrics,
    NonFiniteError,
    Problem,
    Shard,
    State,
    Variable,
    fit,
)
from bilevel.blocks import find_blocks
from bilevel.data import Stream, generator
from bilevel.launch import world_size
from bilevel.optimizer import AdamW
from bilevel.problem import Measure
from bilevel_llm.baselines.base import Baseline, Outcome, Selection, Spent, Task
from bilevel_llm.baselines.projection import Projection
from bilevel_llm.baselines.row_gradients import How, RowGradients, row_batches
from bilevel_llm.baselines.token_means import batch_tokens
from bilevel_llm.data.batches import TokenBatch
from bilevel_llm.data.tokens import TokenTable
from bilevel_llm.model.language_model import LanguageModel, batch_losses
from bilevel_llm.reweighting.problem import LLMReweighting

log = logging.getLogger("bilevel.llm")

ADAM = AdamW(betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)  # as in the authors' code
ROWS = 8  # rows of one vectorized pass, if the backend does not limit its micro-batches


Settings = Literal["small", "paper"]
"""small: for small models and quick answers; paper: what the paper's experiments had."""

PRESETS: Mapping[Settings, Mapping[str, float]] = {
    "small": {"share": 0.05, "dimension": 8192, "checkpoints": 1, "lr": 2e-4, "rank": 8},
    "paper": {"share": 0.05, "dimension": 8192, "checkpoints": 4, "lr": 2e-5, "rank": 128},
}
"""Settings -> the keys that they give."""

_OF_SETTINGS: Any = None  # a default that `LESS.__post_init__` replaces by the value in PRESETS


@dataclass(frozen=True)
class LESS(Baseline):
    """Select the rows whose training step most resembles a step on the validation rows.

    settings: where the five keys below that are not given come from: "small" (the default), or "paper". Keys that are given
        count, and a note says where they depart from the paper's. What both have in common with the paper: LoRA on the maps
        of attention with α = 4 * rank, Adam's directions for training rows and plain gradients for validation rows, and a
        warm-up of the length of four epochs of 5% of the rows. What neither has: the paper's dropout of 0.1 on the
        adapters, and its linear decay of the step size.
    share: the share of all rows that is selected. 5%, as in the paper.
    dimension: d, the dimension of the projection. 8192, as in the paper, which keeps cosines to about ±0.016.
    checkpoints: how many times during the warm-up, equally spaced, gradients are taken. The paper has 4, one per epoch; each
        costs a pass over all data. "small" has 1.
    lr: step size of the warm-up. The paper has 2e-5 and some 1,700 steps. "small" has ten times that step size, which makes
        up for a warm-up of only tens of steps.
    rank: rank of the adapters, which are put on the linear maps of attention, as in the paper. The paper has 128. "small"
        has 8, which suits small models and keeps the gradients of single rows short.
    warmup_steps: steps of the warm-up, on batches that hold all sources equally. None: the length of four epochs of 5% of
        the rows, as in the paper, but at most run.steps; with settings of the paper, a note says so where it is cut.
    blocks: the blocks of the model whose gradients are taken, instead of those of adapters.
    gradients: how the gradients of single rows are taken; see `How`.

    The backend decides on devices, processes and precision. The size of its micro-batches is also the number of rows
    in one vectorized backward pass: 8 if it sets no limit. Every process takes the gradients of its part of the rows, for
    which it needs all parameters: backends that split them are refused. If `active` trains only some of the adapters or
    blocks at a time, the gradients are those of what trains at the checkpoint.
    """

    settings: Settings = "small"
    share: float = _OF_SETTINGS
    dimension: int = _OF_SETTINGS
    checkpoints: int = _OF_SETTINGS
    lr: float = _OF_SETTINGS
    rank: int = _OF_SETTINGS
    warmup_steps: int | None = None
    blocks: tuple[str, ...] = ()
    gradients: How = "auto"

    def __post_init__(self) -> None:
        if self.settings not in PRESETS:
            raise ValueError(f"settings must be one of {', '.join(PRESETS)}, not {self.settings!r}")
        for name, value in PRESETS[self.settings].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name in ("dimension", "checkpoints", "rank", "lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, not {self.share}")
        if self.warmup_steps is not None and self.warmup_steps < self.checkpoints:
            raise ValueError(
                f"warmup_steps must be at least the number of checkpoints ({self.checkpoints}), not {self.warmup_steps}: "
                "Adam's moments come from the warm-up"
            )

    def check(self, task: Task) -> None:
        """The warm-up must fit into the budget, and every process must hold all parameters."""
        steps = self._steps(task)
        if steps > task.run.limit:
            raise InputError(f"less: baseline.warmup_steps={steps} is more than the budget run.steps={task.run.limit}")
        if steps < self.checkpoints:
            raise InputError(f"less: {self.checkpoints} checkpoints need as many warm-up steps; run.steps={task.run.limit}")
        placement = task.backend.placement(world_size())
        if placement.split_parameters:
            raise InputError(
                f"less takes the gradients of single rows, for which every process needs all parameters, and the backend "
                f"{placement.name} splits them; set backend.name=torch for one process, or backend.name=deepspeed with "
                "backend.zero_stage=2 (or lower) for several"
            )

    def most_rows(self, rows: int) -> int:
        """`share` of the rows, rounded, but at least one row."""
        return max(1, round(self.share * rows))

    def find(self, task: Task) -> Outcome:
        """Warm up, score every row, select the best."""
        started = time.perf_counter()
        scores = self.scores(task)
        seconds = time.perf_counter() - started
        selection = Selection.best(scores, self.most_rows(sum(map(len, scores.values()))))
        tables = [*task.problem.source_tables.values(), *task.problem.validation_tables.values()]
        tokens = sum(batch_tokens(task.problem, t, task.run.seed) for t in range(self._steps(task)))
        tokens += self.checkpoints * sum(len(table.ids) for table in tables)
        notes = [
            f"less selects single rows: {len(selection)} are in selection.jsonl; a source's weight is its share of them"
        ]
        notes += self._departures(task)
        return Outcome(selection.shares, Spent(round(seconds, 3), tokens, tokens), selection=selection, notes=notes)

    def scores(self, task: Task) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
        """Source -> the score of every row of its table. Every process gets the same scores."""
        problem, steps = task.problem, self._steps(task)
        total = {name: torch.zeros(len(problem.validation_tables), len(t)) for name, t in problem.source_tables.items()}

        def add_cosines(variable: Variable, backend: Backend) -> None:
            for name, cosines in self._cosines(problem, variable, backend).items():
                total[name] += cosines / self.checkpoints

        ends = frozenset(steps * (i + 1) // self.checkpoints for i in range(self.checkpoints))
        fit(
            _WarmUp(problem, self, task.run.seed),
            _DescentWithStops(lr=self.lr, optimizer=ADAM, stops=ends, at_stop=add_cosines),
            task.backend,
            steps=steps,
            seed=task.run.seed,
            active=task.active,
            recipe=task.recipe or {},
            observer=task.observer,
        )
        scores = {name: score.max(0).values.double().numpy() for name, score in total.items()}
        for name, score in scores.items():
            if not np.isfinite(score).all():
                where = problem.source_tables[name].where(int((~np.isfinite(score)).argmax()))
                raise NonFiniteError(f"less: the score of the row {where} is not finite; lower baseline.lr")
        return scores

    def model(self, problem: LLMReweighting, seed: int) -> LanguageModel:
        """The model, in which only fresh adapters or the chosen blocks require gradients.

        Raises `InputError` if there is no such block, or if there is nothing to put adapters on.
        """
        model = replace(problem, lora=None).lower()  # the adapters are the method's own
        assert isinstance(model, LanguageModel)
        if self.blocks:
            try:
                chosen = set(find_blocks(model).parameters(frozenset(self.blocks)))
            except InputError as error:
                raise InputError(f"baseline.blocks: {error}") from error
        else:
            chosen = _add_adapters(model, self.rank, seed)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in chosen)
        return model

    def _cosines(self, problem: LLMReweighting, variable: Variable, backend: Backend) -> dict[str, Tensor]:
        """Source -> the mean cosine of each row with the rows of each validation set, on the CPU. Shape: (sets, rows)."""
        shard = backend.shard
        trained = variable.blocks.parameters(variable.active)
        rows = RowGradients(backend.whole_module(variable), trained, self.gradients)
        project = Projection(rows.size, self.dimension, shard.seed, rows.device)
        adam = Adam.of(backend.optimizer_state(variable), rows.parameters)
        log.info("less: taking a gradient of %s numbers for every row", f"{rows.size:,}")

        sums = []
        for table in problem.validation_tables.values():
            features = self._features(table, rows, project, None, shard)
            mine = sum((part.sum(0).cpu() for _, part in features), torch.zeros(self.dimension))
            sums.append(sum(backend.all_gather(mine), torch.zeros(self.dimension)) / len(table))
        directions = torch.stack(sums)

        cosines = {}
        for name, table in problem.source_tables.items():
            features = self._features(table, rows, project, adam, shard)
            scored = [(numbers, directions @ part.cpu().T) for numbers, part in features]
            cosines[name] = torch.zeros(len(directions), len(table))
            for parts in backend.all_gather(scored):
                for numbers, part in parts:
                    cosines[name][:, numbers] = part
        return cosines

    def _features(
        self, table: TokenTable, rows: RowGradients, project: Projection, adam: Adam | None, shard: Shard
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Projected gradients, of length 1, of this process's rows of a table: (numbers of rows, (rows, dimension)).

        adam: if given, the direction of its next step is projected instead of the gradient.
        """
        mine = range(shard.rank, len(table), shard.world_size)
        for numbers, batch in row_batches(table, mine, shard.micro_batch_size or ROWS, rows.device):
            gradients = rows(batch)
            yield numbers, nn.functional.normalize(project(gradients if adam is None else adam.direction(gradients)))

    def _steps(self, task: Task) -> int:
        return min(task.run.limit, self._steps_of_paper(task)) if self.warmup_steps is None else self.warmup_steps

    def _steps_of_paper(self, task: Task) -> int:
        """Four epochs of 5% of the rows, and a step for every checkpoint."""
        rows = sum(map(len, task.problem.source_tables.values()))
        return max(self.checkpoints, math.ceil(4 * 0.05 * rows / task.problem.batch_size))

    def _departures(self, task: Task) -> list[str]:
        """Where settings "paper" are not the paper's, as notes."""
        if self.settings != "paper":
            return []
        own = {name: getattr(self, name) for name, value in PRESETS["paper"].items() if getattr(self, name) != value}
        notes = []
        if own:
            words = ", ".join(f"{name}={value} (paper: {PRESETS['paper'][name]})" for name, value in own.items())
            notes.append(f"these are the settings of the paper, except for {words}")
        steps, all_steps = self._steps(task), self._steps_of_paper(task)
        if steps != all_steps:
            reason = f"run.steps={task.run.limit}" if self.warmup_steps is None else "baseline.warmup_steps"
            notes.append(f"the warm-up took {steps} steps, by {reason}; the paper's four epochs would be {all_steps}")
        return notes


@dataclass(frozen=True, eq=False)
class Adam:
    """What Adam remembers of some parameters, laid out one after another.

    m, v: means of the gradients and of their squares, without the bias corrections. Shape: (n,).
    steps: how many steps each number has taken; blocks that became active later have taken fewer. Shape: (n,).
    """

    m: Tensor
    v: Tensor
    steps: Tensor

    @classmethod
    def of(cls, state: Mapping[str, Mapping[str, Tensor]], parameters: Mapping[str, Tensor]) -> Adam:
        """Read it from torch's optimizer state. A parameter that the loss ignores has no state: its moments are 0."""
        found: dict[str, list[Tensor]] = {"exp_avg": [], "exp_avg_sq": [], "step": []}
        for name, parameter in parameters.items():
            for key, parts in found.items():
                value = state.get(name, {}).get(key, torch.zeros(()))
                parts.append(value.to(parameter.device, torch.float32).expand(parameter.shape).flatten())
        return cls(*(torch.cat(parts) for parts in found.values()))

    def direction(self, gradients: Tensor) -> Tensor:
        """Γ: minus the step that Adam would take next on each gradient, divided by the step size. Shape: (rows, n)."""
        β1, β2 = ADAM.betas
        next_step = (self.steps + 1).to(gradients)
        mean = (β1 * self.m + (1 - β1) * gradients) / -torch.expm1(next_step * math.log(β1))  # 1 - β1^(t+1)
        square = (β2 * self.v + (1 - β2) * gradients**2) / -torch.expm1(next_step * math.log(β2))
        return mean / (square.sqrt() + ADAM.eps)


@dataclass
class _WarmUp(Problem[TokenBatch]):
    """Train what `LESS.model` leaves trainable on the mean over sources of the mean loss of a source's rows."""

    data: LLMReweighting
    less: LESS
    seed: int

    labels = LLMReweighting.labels

    def prepare(self) -> None:
        self.data.prepare()

    def fingerprint(self) -> str:
        return self.data.fingerprint()

    def upper(self) -> nn.Module:
        return nn.Module()

    def lower(self) -> nn.Module:
        return self.less.model(self.data, self.seed)

    def examine(self, measure: Measure) -> None:
        self.data.examine(measure)

    def upper_loss(self, x: Forward, y: Forward, batch: TokenBatch) -> Loss:
        return self.data.validation_loss(y, batch)

    def lower_loss(self, x: Forward, y: Forward, batch: TokenBatch) -> Loss:
        return batch.means(batch_losses(y, batch)).mean()

    def upper_batch(self, index: int, shard: Shard) -> Sequence[TokenBatch]:
        return []

    def lower_batch(self, index: int, shard: Shard) -> Sequence[TokenBatch]:
        return self.data.lower_batch(index, shard)


@dataclass(frozen=True, kw_only=True)
class _DescentWithStops(Descent):
    """Descent that passes its variable to `at_stop` after each number of steps in `stops`."""

    stops: frozenset[int]
    at_stop: Callable[[Variable, Backend], None]

    def init(self, problem: Problem[Any], backend: Backend) -> State:
        """Load the model before it is placed: adapters start from values, which a deferred module does not have."""
        module = problem.lower()
        x = backend.place("x", problem.upper, self.optimizer, sharded=False)
        z = backend.place("z", lambda: module, self.optimizer, sharded=True, blocks=problem.blocks)
        return State(x, {"z": z})

    def step(self, t: int, state: State, problem: Problem[Any], backend: Backend) -> Metrics:
        """Take a step, and stop afterwards if a stop is due."""
        metrics = super().step(t, state, problem, backend)
        if t + 1 in self.stops:
            self.at_stop(state.replicas["z"], backend)
        return metrics


def _add_adapters(model: LanguageModel, rank: int, seed: int) -> set[str]:
    """Put LoRA adapters on the linear maps of attention (or, if none is named so, of all repeated layers).

    Returns the names of their parameters. Raises `InputError` if there is nothing to put them on.
    """
    from peft import LoraConfig, inject_adapter_in_model

    linear = {name: type(m).__name__ for name, m in model.model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
    targets = [name for name in linear if "att" in name.rpartition(".")[0].rpartition(".")[2].lower()]
    targets = targets or [name for name in linear if any(part.isdigit() for part in name.split("."))]
    if not targets:
        raise InputError("less: this model has no linear layers to put adapters on; name baseline.blocks instead")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(generator(seed, Stream.INIT).integers(2**63)))
        config = LoraConfig(
            r=rank,
            lora_alpha=4 * rank,
            lora_dropout=0.0,
            target_modules=targets,
            fan_in_fan_out=all(linear[name] == "Conv1D" for name in targets),
        )
        inject_adapter_in_model(config, model.model)
    model.eval()
    return {name for name, _ in model.named_parameters() if ".lora_" in name}
