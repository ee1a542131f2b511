"""LESS: Xia et al., "LESS: Selecting Influential Data for Targeted Instruction Tuning" (ICML 2024, arXiv 2402.04333).

    score(z) = max_j  mean over checkpoints of  mean over z' in validation set j of  cos(R'∇ℓ(z'), R'Γ(z))
    Γ(z) = m / (√v + ε),   m = (β1 m_t + (1 - β1) ∇ℓ(z)) / (1 - β1^(t+1)),   v = (β2 v_t + (1 - β2) ∇ℓ(z)²) / (1 - β2^(t+1))

A short warm-up trains LoRA adapters (Hu et al. 2021) with Adam and leaves its moments m_t, v_t. Γ(z) is the direction in
which Adam would step next on row z; ∇ℓ(z') the gradient of a validation row's loss; both are projected by random signs R.
The rows with the highest scores are selected. As in the authors' code, each validation row counts by its own cosine. The
step size, by which the paper weighs checkpoints, is constant here.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from bilevel import SGD, Backend, InputError, NonFiniteError, Shard
from bilevel.blocks import find_blocks
from bilevel.data import Stream, generator
from bilevel.launch import local_rank, world_size
from bilevel_llm.baselines.base import Cost, Outcome, Selection, Task, Weighting
from bilevel_llm.baselines.projection import Projection
from bilevel_llm.baselines.row_gradients import How, RowGradients, row_batches
from bilevel_llm.baselines.token_means import batch_tokens
from bilevel_llm.data.tokens import TokenTable
from bilevel_llm.model.language_model import LanguageModel, token_losses
from bilevel_llm.reweighting.problem import LLMReweighting

log = logging.getLogger("bilevel.llm")

BETAS, EPSILON = (0.9, 0.999), 1e-8  # Adam's, as in the authors' code
HELD = 1 << 27  # numbers of unprojected gradients that wait for the signs at a time: 512 MiB


@dataclass(frozen=True)
class LESS(Weighting):
    """Select the rows whose training step most resembles a step on the validation rows.

    share: of all rows, that is selected. 5%, as in the paper.
    dimension: d of the projection. The paper has 8192; 1024 keeps cosines to about ±0.04, at an eighth of the work.
    checkpoints: how often in the warm-up, at equal distances, gradients are taken. The paper has 4, one an epoch; each costs
        a pass over all data.
    warmup_steps: steps of the warm-up, on batches that hold all sources equally. None: as many as four epochs of 5% of the
        rows are, as in the paper, but at most run.steps.
    lr: of the warm-up. The paper has 2e-5 and some 1,700 steps; ten times that makes up for a warm-up of tens of steps.
    rank: of the adapters, on the linear maps of attention, as in the paper, which has 128; 8 suits small models and keeps
        the projection cheap. Their scale α is 4 * rank, as there.
    blocks: take the gradients of these blocks of the model instead of adapters; such a model is held in float32.
    dtype: of the frozen weights. None: that of the model's files.
    micro_batch_size: rows of one vectorised backward pass.
    gradients: how rows are kept apart.

    Rows are split over the processes of torch.distributed, if it is initialised or a launcher (torchrun) asks for several.
    """

    share: float = 0.05
    dimension: int = 1024
    checkpoints: int = 1
    warmup_steps: int | None = None
    lr: float = 2e-4
    rank: int = 8
    blocks: tuple[str, ...] = ()
    dtype: Literal["float32", "bfloat16"] | None = None
    micro_batch_size: int = 8
    gradients: How = "auto"

    def __post_init__(self) -> None:
        for name in ("checkpoints", "rank", "micro_batch_size", "lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, not {self.share}")
        if self.warmup_steps is not None and self.warmup_steps < self.checkpoints:
            raise ValueError(
                f"warmup_steps must be at least the number of checkpoints ({self.checkpoints}), not {self.warmup_steps}: "
                "Adam's moments come from the warm-up"
            )
        if self.blocks and self.dtype == "bfloat16":
            raise ValueError("dtype must be float32 where blocks are trained: bfloat16 would round their steps away")
        Projection(1, self.dimension, 0)

    def check(self, task: Task) -> None:
        """The budget must hold the warm-up."""
        steps = self._steps(task)
        if steps > task.steps:
            raise InputError(f"less: weighting.warmup_steps={steps} is more than the budget run.steps={task.steps}")
        if steps < self.checkpoints:
            raise InputError(f"less: {self.checkpoints} checkpoints need as many warm-up steps, run.steps is {task.steps}")

    def weigh(self, task: Task) -> Outcome:
        """Warm up, score every row, select the best."""
        with Ranks.joined(_device(task.backend, task.seed)) as ranks:
            started = time.perf_counter()
            scores = self.scores(task, ranks)
            seconds = time.perf_counter() - started
        selection = Selection.best(scores, max(1, round(self.share * sum(map(len, scores.values())))))
        tables = [*task.problem.source_tables.values(), *task.problem.validation_tables.values()]
        tokens = sum(batch_tokens(task.problem, t, task.seed) for t in range(self._steps(task)))
        tokens += self.checkpoints * sum(len(table.ids) for table in tables)
        notes = [f"less scores single rows: {len(selection)} are in selection.jsonl; the weights are their shares by source"]
        return Outcome(selection.shares, Cost(round(seconds, 3), tokens, tokens), selection=selection, notes=notes)

    def scores(self, task: Task, ranks: Ranks) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
        """Source -> score of every row of its table."""
        problem, device = task.problem, ranks.device
        model = self.model(problem, task.seed).to(device)
        rows = RowGradients(model, self.gradients)
        project = Projection(rows.size, self.dimension, task.seed)
        optimizer = torch.optim.AdamW(list(rows.parameters.values()), lr=self.lr, betas=BETAS, eps=EPSILON, weight_decay=0)
        steps = self._steps(task)
        ends = [steps * (i + 1) // self.checkpoints for i in range(self.checkpoints)]
        log.info("less: %d warm-up steps, %s numbers in a gradient", steps, f"{rows.size:,}")

        total = {name: torch.zeros(len(problem.validation_tables), len(t)) for name, t in problem.source_tables.items()}
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            for t in range(start, end):
                _warm_up_step(t, task, model, optimizer, self.micro_batch_size, ranks)
            m, v = (
                torch.cat([optimizer.state[p][key].flatten() for p in rows.parameters.values()])
                for key in ("exp_avg", "exp_avg_sq")
            )
            directions = torch.stack(
                [
                    self._features(name, table, rows, project, None, ranks).mean(0)
                    for name, table in problem.validation_tables.items()
                ]
            )
            for name, table in problem.source_tables.items():
                features = self._features(name, table, rows, project, (m, v, end), ranks)
                total[name] += directions @ features.T / self.checkpoints
        scores = {name: score.max(0).values.double().numpy() for name, score in total.items()}
        for name, score in scores.items():
            if not np.isfinite(score).all():
                where = problem.source_tables[name].where(int((~np.isfinite(score)).argmax()))
                raise NonFiniteError(f"less: the score of the row {where} is not finite; lower weighting.lr")
        return scores

    def model(self, problem: LLMReweighting, seed: int) -> LanguageModel:
        """The model with only what is to be trained requiring gradients: fresh adapters, or the chosen blocks."""
        model = problem.lower()
        assert isinstance(model, LanguageModel)
        if self.blocks:
            model.float()
            try:
                chosen = set(find_blocks(model).parameters(frozenset(self.blocks)))
            except InputError as error:
                raise InputError(f"weighting.blocks: {error}") from error
        else:
            if self.dtype is not None:
                model.to(getattr(torch, self.dtype))
            chosen = _add_adapters(model, self.rank, seed)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in chosen)
            if name in chosen:
                parameter.data = parameter.data.float()
        return model

    def _features(
        self,
        name: str,
        table: TokenTable,
        rows: RowGradients,
        project: Projection,
        adam: tuple[Tensor, Tensor, int] | None,
        ranks: Ranks,
    ) -> Tensor:
        """Projected gradients of all rows of a table, of length 1, on the CPU. Shape: (rows, dimension).

        adam: moments after so many steps: take the direction of Adam's next step instead of the gradient.
        """
        features = torch.zeros(len(table), self.dimension, device=ranks.device)
        waiting: list[Tensor] = []
        numbers: list[int] = []

        def flush() -> None:
            features[torch.tensor(numbers, device=ranks.device)] = nn.functional.normalize(project(torch.cat(waiting)))
            waiting.clear()
            numbers.clear()

        batches = list(row_numbers(len(table), ranks))
        console = Console(stderr=True)
        found = row_batches(table, batches, self.micro_batch_size, ranks.device)
        count = math.ceil(len(batches) / self.micro_batch_size)
        for part, batch in track(found, f"gradients of {name}", count, console=console, disable=not console.is_terminal):
            gradients = rows(batch)
            waiting.append(gradients if adam is None else adam_direction(gradients, *adam))
            numbers += part
            if len(numbers) * rows.size >= HELD:
                flush()
        if numbers:
            flush()
        return ranks.sum(features).cpu()

    def _steps(self, task: Task) -> int:
        if self.warmup_steps is not None:
            return self.warmup_steps
        rows = sum(map(len, task.problem.source_tables.values()))
        return min(task.steps, max(self.checkpoints, math.ceil(4 * 0.05 * rows / task.problem.batch_size)))


def adam_direction(gradients: Tensor, m: Tensor, v: Tensor, steps: int) -> Tensor:
    """Γ: minus the step that Adam would take next, over its step size, for each gradient by itself.

    gradients: (rows, n). m, v: the moments after `steps` steps, without their bias corrections. Shape: (n,).
    """
    mean = (BETAS[0] * m + (1 - BETAS[0]) * gradients) / (1 - BETAS[0] ** (steps + 1))
    square = (BETAS[1] * v + (1 - BETAS[1]) * gradients**2) / (1 - BETAS[1] ** (steps + 1))
    return mean / (square.sqrt() + EPSILON)


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the rows."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    @contextmanager
    def joined(cls, device: torch.device) -> Iterator[Ranks]:
        """The group of torch.distributed, made here if a launcher asks for one that nobody has made."""
        several = world_size() > 1
        if several and device.type == "cuda":
            device = torch.device("cuda", local_rank())
        own = several and not dist.is_initialized()
        if own:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        try:
            yield cls(dist.get_rank(), dist.get_world_size(), device) if dist.is_initialized() else cls(0, 1, device)
        finally:
            if own:
                dist.destroy_process_group()

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor


def row_numbers(count: int, ranks: Ranks) -> range:
    """The rows that this process takes."""
    return range(ranks.rank, count, ranks.size)


def _warm_up_step(
    t: int, task: Task, model: LanguageModel, optimizer: torch.optim.Optimizer, micro_batch_size: int, ranks: Ranks
) -> None:
    """A step on the mean over sources of the mean loss of a source's rows."""
    shard = Shard(task.seed, ranks.rank, ranks.size, micro_batch_size)
    parameters = optimizer.param_groups[0]["params"]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for batch in task.problem.lower_batch(t, shard):
        losses = token_losses(
            model(batch.ids.to(ranks.device), batch.positions.to(ranks.device)), batch.targets.to(ranks.device)
        )
        loss = (batch.weights.to(losses) @ losses).mean()
        if not bool(torch.isfinite(loss)):
            raise NonFiniteError(f"less: the loss of warm-up step {t} is {float(loss)}; lower weighting.lr")
        loss.backward()  # type: ignore[no-untyped-call]
    for parameter in parameters:
        ranks.sum(parameter.grad)
    optimizer.step()


def _add_adapters(model: LanguageModel, rank: int, seed: int) -> set[str]:
    """Put LoRA adapters on the linear maps of attention (of all repeated layers, if none is called so). Returns their names.

    Raises `InputError` if there is nothing to put them on.
    """
    from peft import LoraConfig, inject_adapter_in_model

    linear = {name: type(m).__name__ for name, m in model.model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
    targets = [name for name in linear if "att" in name.rpartition(".")[0].rpartition(".")[2].lower()]
    targets = targets or [name for name in linear if any(part.isdigit() for part in name.split("."))]
    if not targets:
        raise InputError("less: this model has no linear layers to put adapters on; name weighting.blocks instead")
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


def _device(backend: Backend, seed: int) -> torch.device:
    """Where the backend would put a model: asked by letting it place a small one."""
    backend.start(seed)
    try:
        probe = backend.place("probe", lambda: nn.Linear(1, 1), SGD(), sharded=False)
        return next(iter(backend.read(probe).parts.values())).device
    finally:
        backend.close()
