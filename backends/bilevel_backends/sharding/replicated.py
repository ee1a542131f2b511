"""ZeRO stage 0, which is data parallelism: every process holds and updates the same parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from bilevel_backends.processes import Processes
from bilevel_backends.sharding.bucket import Bucket
from bilevel_backends.sharding.flat import FlatLayout
from bilevel_backends.sharding.strategy import SummingStrategy


class Replicated(SummingStrategy):
    """All processes hold all parameters; so are variables held that are not sharded, such as x."""

    whole = True
    reduces_at_step = True

    def __init__(self, module: nn.Module, processes: Processes) -> None:
        super().__init__(module)
        self.processes = processes
        self.holder = (processes.rank, processes.world_size)

    def local(self, name: str) -> Tensor:
        """The parameter."""
        return self.parameters[name].detach()

    def bucket(self, names: Sequence[str], dtype: torch.dtype) -> Bucket:
        """With a single row, of whole gradients."""
        layout = FlatLayout({name: self.parameters[name].numel() for name in names})
        return Bucket(layout, 1, dtype, self.parameters[names[0]].device)

    def start_sum(self, bucket: Bucket) -> Callable[[], Tensor]:
        """All-reduce."""
        total = self.processes.all_reduce(bucket.announce())[0]
        return lambda: total

    def stretch(self, name: str) -> range:
        """All."""
        return range(self.parameters[name].numel())

    def gather(self, name: str, shard: Tensor, rank: int) -> Tensor | None:
        """The tensor, which every process has whole already."""
        return shard if self.processes.rank == rank else None

    def shape(self, name: str) -> tuple[int, ...]:
        """The parameter's shape."""
        return tuple(self.parameters[name].shape)
