"""The runs of a swarm as one problem and one solver: the same short training, again and again, on other mixes.

Because it is one run of the core, it can be stopped and resumed at any step, and works with every backend. What it finds,
the loss of every validation row after every run, is its upper variable: like any other it is kept in checkpoints, and is
returned at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bilevel import SGD, Active, Backend, Forward, Loss, Metrics, Problem, Shard, Solver, State, Variable, Vector
from bilevel.blocks import Blocks
from bilevel.data import Stream
from bilevel.optimizer import AdamW
from bilevel.problem import Measure
from bilevel.schedule import Schedule, at
from bilevel_llm.baselines.mixed_batches import DrawnByWeight, InOrder
from bilevel_llm.data.batches import MicroBatches, TokenBatch, micro_batches
from bilevel_llm.model.language_model import batch_losses
from bilevel_llm.reweighting.problem import LLMReweighting


class RowLosses(nn.Module):
    """The loss of every validation row after every run; 0 until the run is done. Shape: (runs, rows)."""

    def __init__(self, runs: int, rows: int) -> None:
        super().__init__()
        self.losses = nn.Parameter(torch.zeros(runs, rows, dtype=torch.float64))


@dataclass
class SwarmRuns(Problem[TokenBatch]):
    """Train on one mix after the other. Step t is step t % length of run t // length.

    mixes: the weights of the sources in each run. Shape: (runs, sources).
    length: the steps of a run.

    All runs see the rows of a source in the same order, and differ only in how many of them a batch holds.
    """

    data: LLMReweighting
    mixes: NDArray[np.float64]
    length: int

    labels = LLMReweighting.labels

    def prepare(self) -> None:
        """Prepare the data."""
        self.data.prepare()

    def fingerprint(self) -> str:
        """The hash of data and model."""
        return self.data.fingerprint()

    def identity(self) -> Mapping[str, Any]:
        """That of the data."""
        return self.data.identity()

    def upper(self) -> nn.Module:
        """What is to be found."""
        return RowLosses(len(self.mixes), sum(map(len, self.data.validation_tables.values())))

    def lower(self) -> nn.Module:
        """The model from which every run starts."""
        return self.data.lower()

    def examine(self, measure: Measure) -> None:
        """The model must be what the data's problem needs."""
        self.data.examine(measure)

    def blocks(self, module: nn.Module) -> Blocks:
        """The blocks of the model."""
        return self.data.blocks(module)

    def upper_loss(self, x: Forward, y: Forward, batch: TokenBatch) -> Loss:
        """The validation loss."""
        return self.data.validation_loss(y, batch)

    def lower_loss(self, x: Forward, y: Forward, batch: TokenBatch) -> Loss:
        """The mean over the rows of a batch; its parts are what each source adds to it."""
        parts = batch.means(batch_losses(y, batch))
        return parts.sum(), dict(zip(self.data.source_tables, parts.detach(), strict=True))

    def upper_batch(self, index: int, shard: Shard) -> Sequence[TokenBatch]:
        """None: runs are scored on whole validation sets."""
        return []

    def lower_batch(self, index: int, shard: Shard) -> Sequence[TokenBatch]:
        """Rows drawn by the mix of the run."""
        tables = list(self.data.source_tables.values())
        sampler, t = self._sampler(index), index % self.length
        parts = torch.from_numpy(self.parts(index)).float().unsqueeze(1)
        batches = micro_batches(tables, sampler, t, shard, packed=self.data.packed)
        return MicroBatches(lambda batch: replace(batch, weights=batch.weights * parts), batches)

    def parts(self, index: int) -> NDArray[np.float64]:
        """The part of each source in the rows of lower batch number `index`. Shape: (sources,)."""
        sampler = self._sampler(index)
        return sampler.counts(index % self.length) / sampler.batch_size

    def _sampler(self, index: int) -> DrawnByWeight:
        sizes = tuple(map(len, self.data.source_tables.values()))
        weights = tuple(self.mixes[index // self.length].tolist())
        return DrawnByWeight(sizes, self.data.batch_size, Stream.LOWER, weights)


@dataclass(frozen=True)
class OneAfterAnother(Solver[State]):
    """Carry out the runs of `SwarmRuns`: restart the model and its optimizer, train, and score every validation row.

    lr, optimizer: those of every run; a schedule begins anew with each.
    """

    lr: Schedule
    optimizer: SGD | AdamW

    takes: ClassVar[type[Problem[Any]]] = SwarmRuns

    def init(self, problem: Problem[Any], backend: Backend) -> State:
        """Place the losses, the model at its start, which never moves, and the model that is trained."""
        x = backend.place("x", problem.upper, SGD(), sharded=False)
        start = backend.place("start", problem.lower, self.optimizer, sharded=True, blocks=problem.blocks)
        return State(x, {"start": start, "z": backend.replicate(start, "z")})

    def step(self, t: int, state: State, problem: Problem[Any], backend: Backend) -> Metrics:
        """Take a step of a run. It restarts the model at the run's first step, and scores it after the last one."""
        assert isinstance(problem, SwarmRuns)
        run, own = divmod(t, problem.length)
        x, z = state.x, state.replicas["z"]
        if own == 0:
            backend.assign(z, state.replicas["start"])
        batch = problem.lower_batch(t, backend.shard)
        loss = backend.backward(lambda b: problem.lower_loss(x, z, b), batch, wrt={z: 1})
        norm = backend.step(z, lr=at(self.lr, own))
        parts = dict(zip(loss.parts, problem.parts(t).tolist(), strict=True))
        scored: Metrics = {}
        if own == problem.length - 1:
            losses = [row_losses(z, problem.data, name, backend) for name in problem.data.validation_tables]
            before = backend.read(x)
            ((name, found),) = before.parts.items()
            found[run] = torch.from_numpy(np.concatenate(losses)).to(found)
            backend.write(x, Vector({name: found}, before.whole))
            means = {name: float(one.mean()) for name, one in zip(problem.data.validation_tables, losses, strict=True)}
            shares = set_shares(problem.data)
            scored = {"upper_loss": sum(shares[name] * mean for name, mean in means.items()), "upper_parts": means}
        return {
            **scored,
            "held": 1.0,
            "run": float(run),
            "lower_loss": loss.value,
            "lower_parts": {name: value / parts[name] for name, value in loss.parts.items() if parts[name]},
            "grad_norm": norm,
        }


@dataclass(frozen=True)
class EachRunAlike(Active):
    """A rule for active blocks that begins anew with every run, so that all runs train the same blocks at the same steps."""

    rule: Active
    length: int

    def at(self, t: int, blocks: Blocks, seed: int) -> frozenset[str]:
        """What the rule says of the step within its run."""
        return self.rule.at(t % self.length, blocks, seed)


def set_shares(data: LLMReweighting) -> dict[str, float]:
    """Validation set -> its share of the validation loss."""
    total = sum(one.weight for one in data.validation)
    return {name: one.weight / total for name, one in zip(data.validation_tables, data.validation, strict=True)}


def row_losses(y: Variable, data: LLMReweighting, name: str, backend: Backend) -> NDArray[np.float64]:
    """The mean loss over its targets of every row of a validation set, in every process. Shape: (rows,)."""
    table, shard = data.validation_tables[name], backend.shard
    size = min(len(table), data.validation_rows)
    in_order = InOrder((len(table),), max(1, size - size % shard.world_size), Stream.UPPER)
    found = np.zeros(len(table))
    for index in range(in_order.batches):
        first, rows = in_order.first(index), in_order.batch_size

        def by_row(batch: TokenBatch, first: int = first, rows: int = rows) -> Loss:
            losses = batch_losses(y, batch)
            in_row = rows * batch.weights[0].to(losses)  # of a target in its row's mean
            sums = losses.new_zeros(rows).index_add(0, (batch.rows - first)[batch.row_of_target], in_row * losses)
            return sums.sum() / rows, {str(row): value for row, value in enumerate(sums)}

        batches = micro_batches([table], in_order, index, shard, packed=data.packed)
        parts = backend.evaluate(by_row, batches).parts
        found[first : first + rows] = list(parts.values())
    return found
