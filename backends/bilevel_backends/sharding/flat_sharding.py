"""What the strategies with flat shards have in common: the sum of gradients, and shards of whole tensors and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from bilevel_backends.processes import Grid
from bilevel_backends.sharding.bucket import Bucket
from bilevel_backends.sharding.flat import FlatLayout, flat_stretch
from bilevel_backends.sharding.strategy import SummingStrategy
from bilevel_backends.side_stream import SideStream


class FlatSharding(SummingStrategy):
    """Each parameter is flattened and divided among the processes of a group; see `Grid`."""

    def __init__(self, module: nn.Module, grid: Grid, device: torch.device, *, reduces_at_step: bool) -> None:
        super().__init__(module)
        self.grid = grid
        self.shards = grid.shards
        self.holder = (grid.replicas.rank, grid.replicas.world_size)
        self.reduces_at_step = reduces_at_step
        self._device = device
        self._side = SideStream(device)

    def bucket(self, names: Sequence[str], dtype: torch.dtype) -> Bucket:
        """With a row for each process of the group."""
        return Bucket(self.layout(names), self.shards.world_size, dtype, self._device)

    def start_sum(self, bucket: Bucket) -> Callable[[], Tensor]:
        """Reduce-scatter in the group, and all-reduce this process's row over the other groups."""
        message = bucket.announce()
        mine = torch.empty_like(message[0])
        return self._side.start(lambda: self.grid.replicas.all_reduce(self.shards.reduce_scatter(message, mine)))

    def stretch(self, name: str) -> range:
        """As many as the others hold, but for the padding."""
        return flat_stretch(torch.Size(self.shape(name)).numel(), self.local(name).numel(), self.shards.rank)

    def gather(self, name: str, shard: Tensor, rank: int) -> Tensor | None:
        """The shards one after the other, without the padding. Each group gathers them, and one keeps them."""
        gathered = self.shards.gather(shard, rank % self.shards.world_size)
        if gathered is None or self.grid.everyone.rank != rank:
            return None
        shape = self.shape(name)
        return gathered[: torch.Size(shape).numel()].view(shape)

    def layout(self, names: Sequence[str]) -> FlatLayout:
        """Where the shards of these parameters lie in a message."""
        return FlatLayout({name: self.local(name).numel() for name in names})
