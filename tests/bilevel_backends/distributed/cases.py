"""A small language problem with every difficulty that a sharded backend has: tied weights, a parameter that no number of
processes divides, one smaller than the number of processes, blocks that come and go."""

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bilevel import LISA, AdamW, Backend, Distribution, Problem, Proximity, Rounds, ScaleBiO, Shard, Simplex, fit
from bilevel.checkpoint import SavedVariable, saved_variables

WORDS, WIDTH = 11, 6
Batch = tuple[Tensor, Tensor]


class Layer(nn.Module):
    """Rows that begin with an odd word go through one expert, the others through another, if there are two."""

    def __init__(self, experts: bool) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2 * experts))
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH + 1)
        self.down = nn.Linear(2 * WIDTH + 1, WIDTH)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, hidden: Tensor, odd: Tensor) -> Tensor:
        for expert, rows in zip(self.experts, (odd, ~odd), strict=False):
            if rows.any():
                hidden = hidden.index_copy(0, rows.nonzero()[:, 0], hidden[rows] + torch.tanh(expert(hidden[rows])))
        return hidden + self.scale * self.down(torch.tanh(self.up(self.norm(hidden))))


class Model(nn.Module):
    """With experts, the head has weights of its own, so that this is tried as well."""

    def __init__(self, experts: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(Layer(experts) for _ in range(4))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        if not experts:
            self.head.weight = self.embedding.weight
        self.register_buffer("shift", torch.linspace(0, 1, WORDS))

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids)
        for layer in self.layers:
            hidden = layer(hidden, ids[:, 0] % 2 == 1)
        return self.head(self.norm(hidden)) + self.shift


@dataclass
class Sentences(Problem[Batch]):
    """Three sources of random rows; which of them helps the fourth?"""

    rows: int = 12
    poison: int = -1  # the step at which the first process sees a loss that is not a number
    crash: int = -1  # ... at which the last process fails
    death: int = -1  # ... at which it is killed
    experts: bool = False  # the first process has all rows that begin with an even word
    private: bool = False  # every process reads other data
    pause: float = 0.0  # seconds that a batch takes

    def fingerprint(self) -> str:
        return os.environ.get("RANK", "0") if self.private else ""

    def upper(self) -> nn.Module:
        return Distribution([f"s{source}" for source in range(3)])

    def lower(self) -> nn.Module:
        return Model(self.experts)

    def upper_loss(self, x: Any, y: Any, batch: Batch) -> Tensor:
        return self._losses(y, batch[0]).sum() / self.rows

    def lower_loss(self, x: Any, y: Any, batch: Batch) -> Any:
        losses = self._losses(y, batch[0]).double()
        means = torch.stack([losses[batch[1] == source].sum() / (self.rows / 3) for source in range(3)])
        return torch.dot(x(), means), {f"s{source}": mean.detach() for source, mean in enumerate(means)}

    def upper_batch(self, index: int, shard: Shard) -> Sequence[Batch]:
        return self._batch(2 * index, shard)

    def lower_batch(self, index: int, shard: Shard) -> Sequence[Batch]:
        if index == self.crash and shard.rank == shard.world_size - 1:
            raise RuntimeError("this process fails on purpose")
        if index == self.death and shard.rank == shard.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.pause)
        batch = self._batch(2 * index + 1, shard)
        if index == self.poison and shard.rank == 0:
            batch = [(ids, sources + 0) for ids, sources in batch]
            batch[0][0][:] = -1
        return batch

    def summary(self, x: Any) -> dict[str, float]:
        return {f"s{source}": float(share) for source, share in enumerate(x())}

    def _batch(self, number: int, shard: Shard) -> list[Batch]:
        draw = torch.Generator().manual_seed(number)
        ids = torch.randint(0, WORDS - self.experts, (self.rows, 9), generator=draw)
        ids[::3, 1:] = ids[::3, :1]  # the first source repeats one word
        if self.experts:
            ids[:, 0] = ids[:, 0] // 2 * 2
            ids[1::2, 0] += 1
        rows = [(row, source % 3) for source, row in enumerate(ids)]
        return [(torch.stack([r for r, _ in part]), torch.tensor([s for _, s in part])) for part in shard.split(rows)]

    def _losses(self, y: Any, ids: Tensor) -> Tensor:
        if int(ids.min()) < 0:
            return y(ids.clamp_min(0)).sum() * torch.tensor(float("nan")) + torch.zeros(len(ids))
        logits = y(ids[:, :-1]).float()
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return losses.view(len(ids), -1).mean(1)


class Regularized(Sentences):
    """x is a point of the simplex, and y is held near its start; beside g, which sees every row once, that counts once."""

    upper_constraint = Simplex()
    lower_regularizer = Proximity(0.5)

    def upper(self) -> Any:
        return torch.tensor([0.9, 0.1, 0.0], dtype=torch.float64)


# AdamW with eps 1e-5: with 1e-8 it divides rounding noise by rounding noise where a gradient is next to nothing
SOLVER = ScaleBiO(penalty=5.0, lr_x=0.1, lr_z=1e-2, optimizer_z=AdamW(eps=1e-5, clip=1.0), warmup=2)
ROUNDS = Rounds(horizon=5, penalty=5.0, lr_z=1e-2, optimizer_z=AdamW(eps=1e-5, clip=1.0))
ACTIVE = LISA(blocks=2, period=3, embedding="train", head="train", rest="train")
STEPS, LONG = 8, 12  # blocks are drawn three or four times: one comes back, and one stays when another goes
CHECKED = (4, 8)


def run(backend: Backend, output: Path, **settings: Any) -> Any:
    """Several switches of blocks, with a checkpoint every fourth step."""
    problem = settings.pop("problem", None) or Sentences()
    solver = settings.pop("solver", SOLVER)
    fields = {"steps": STEPS, "checkpoint_every": 4, "keep_checkpoints": 9, "active": ACTIVE, **settings}
    return fit(problem, solver, backend, output=output, **fields)


def tensors(directory: Path, steps: int) -> dict[str, Tensor]:
    """Everything that a checkpoint holds, by variable and name."""
    found: dict[str, Tensor] = {}
    checkpoint = directory / "checkpoints" / f"step-{steps:08d}"
    for variable in saved_variables(checkpoint):
        saved = SavedVariable(checkpoint, variable)
        found |= {f"{variable}/{name}": saved.read(name) for name in saved.shapes}
    return found
