"""The collectives of one step of ScaleBiO in one of two CPU processes, by backend: how many, and how many small ones.

A model of twelve equal layers, of which two train (the same ones in each backend); three passes (g at z, g at y, f at y) of
two micro-batches each. The ideal for split parameters is a gather of every layer forward and of every layer down to the
lowest that trains backward, and a reduction for each layer that trains: at every micro-batch, once a pass, or once a step.

Usage: python benchmarks/collectives.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bilevel import Active, AdamW, Distribution, Problem, ScaleBiO, Shard
from bilevel.blocks import Blocks

PROCESSES, LAYERS, WIDTH, WORDS, ROWS = 2, 12, 32, 64, 8
SMALL = 1000
"""Bytes of a message that takes as long as an empty one on any link."""
KINDS = {
    "_allgather_base_": "all-gather", "allgather_": "all-gather", "allgather_into_tensor_coalesced_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter", "reduce_scatter_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter", "allreduce_": "all-reduce", "allreduce_coalesced_": "all-reduce",
    "broadcast_": "other", "gather_": "other", "scatter_": "other", "reduce_": "other", "alltoall_": "other",
    "alltoall_base_": "other", "barrier": "other", "send": "other", "recv_": "other",
}  # fmt: skip
"""torch's names of the collectives that a step may be made of."""
BLOCK = 5 * WIDTH * (WIDTH + 1) + 2 * WIDTH
FEW_LIVE = {
    "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 2 * BLOCK + WORDS * WIDTH,
    "stage3_max_reuse_distance": 2 * BLOCK,
}  # fmt: skip
"""DeepSpeed would keep all of a model this small; with these, it keeps as much of it as of a 32B model."""
CASES: dict[str, dict[str, Any]] = {
    **{f"zero{stage}": {"zero_stage": stage} for stage in range(3)},
    "zero2, once a step": {"zero_stage": 2, "sync_each_micro_batch": False},
    "zero3": {"config": {"zero_optimization": FEW_LIVE}},
    "zero3, small bucket": {"config": {"zero_optimization": {**FEW_LIVE, "stage3_prefetch_bucket_size": BLOCK // 10}}},
    "zero3, once a step": {"config": {"zero_optimization": FEW_LIVE}, "sync_each_micro_batch": False},
    "fsdp": {},
    "fsdp, once a pass": {"sync_each_micro_batch": False},
}
"""Backend and settings. The small bucket has the proportion of DeepSpeed's own to a block of a 32B model."""


class Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the collectives that this process starts, however they are called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Counter[str] = Counter()
        self.small: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the operation, and do it."""
        if func.namespace == "c10d" and (kind := KINDS.get(func.overloadpacket.__name__)):
            self.found[kind] += 1
            sizes = [each.nbytes for each in torch.utils._pytree.tree_leaves(args) if isinstance(each, Tensor)]
            self.small[kind] += max(sizes, default=0) < SMALL
        return func(*args, **(kwargs or {}))


class Layer(nn.Module):
    """Twelve parameters, small ones among them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.parts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(5))

    def forward(self, hidden: Tensor) -> Tensor:
        """Add what the layer computes."""
        inner = self.norm(hidden)
        for part in self.parts:
            inner = torch.tanh(part(inner))
        total: Tensor = hidden + inner
        return total


class Model(nn.Module):
    """Embedding, layers, norm and head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        """For block discovery."""
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        """For block discovery."""
        return self.head

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of each next word."""
        hidden = self.embedding(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        logits: Tensor = self.head(self.norm(hidden))
        return logits


@dataclass
class Sentences(Problem[Tensor]):
    """Rows of random words."""

    def upper(self) -> nn.Module:
        """Shares of two sources."""
        return Distribution(["first", "second"])

    def lower(self) -> nn.Module:
        """The model."""
        return Model()

    def upper_loss(self, x: Any, y: Any, batch: Tensor) -> Tensor:
        """Mean of the first half's losses."""
        return self._losses(y, batch).sum() / ROWS

    def lower_loss(self, x: Any, y: Any, batch: Tensor) -> Tensor:
        """The weighted mean of even and odd rows."""
        losses = self._losses(y, batch)
        return torch.dot(x().float(), torch.stack([losses[0::2].sum(), losses[1::2].sum()])) / ROWS

    def upper_batch(self, index: int, shard: Shard) -> Sequence[Tensor]:
        """Random words."""
        return self._batch(2 * index, shard)

    def lower_batch(self, index: int, shard: Shard) -> Sequence[Tensor]:
        """Other random words."""
        return self._batch(2 * index + 1, shard)

    def _batch(self, number: int, shard: Shard) -> list[Tensor]:
        ids = torch.randint(0, WORDS, (ROWS, 9), generator=torch.Generator().manual_seed(number))
        return [torch.stack(list(part)) for part in shard.split(list(ids))]

    def _losses(self, y: Any, ids: Tensor) -> Tensor:
        logits = y(ids[:, :-1]).float()
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        means: Tensor = losses.view(len(ids), -1).mean(1)
        return means


@dataclass
class TwoLayers(Active):
    """The fifth and the ninth layer train, always."""

    def at(self, step: int, blocks: Blocks, seed: int) -> frozenset[str]:
        """Their names."""
        return frozenset({blocks.repeated[4], blocks.repeated[8]})


def count(backend: Any) -> dict[str, dict[str, int]]:
    """The collectives of a steady step, in this process: kind -> how many, and how many small ones."""
    problem, solver, active = Sentences(), ScaleBiO(optimizer_z=AdamW(), warmup=0), TwoLayers()
    backend.start(seed=0)
    try:
        state = solver.init(problem, backend)
        for t in range(3):  # engines that learn what comes next know it by then
            state.activate(active, t, 0, backend)
            solver.step(t, state, problem, backend)
        with Count() as counted:
            solver.step(3, state, problem, backend)
    finally:
        backend.close()
    return {"all": dict(counted.found), "small": dict(counted.small)}


def main() -> None:
    """Launch the processes and print a line of each backend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if "RANK" in os.environ:
        _count_all(options.json)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
    file = options.json or Path("collectives.json")
    subprocess.run([sys.executable, *launch, __file__, "--json", str(file)], check=True)
    found = json.loads(file.read_text())
    if options.json is None:
        file.unlink()
    kinds = ("all-gather", "reduce-scatter", "all-reduce", "other")
    print(f"{'':<24}" + "".join(f"{kind:>16}" for kind in kinds) + f"{'small':>8}")
    for name, counts in found.items():
        print(
            f"{name:<24}"
            + "".join(f"{counts['all'].get(kind, 0):>16}" for kind in kinds)
            + f"{sum(counts['small'].values()):>8}"
        )


def _count_all(file: Path) -> None:
    from bilevel.plugins import load_plugins

    torch.set_num_threads(1)
    plugins = load_plugins()
    found = {}
    for name, settings in CASES.items():
        kind = plugins.find("backends", "fsdp" if name.startswith("fsdp") else "deepspeed").load()
        found[name] = count(kind(dtype="float32", micro_batch_size=2, **settings))
    if os.environ["RANK"] == "0":
        file.write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
