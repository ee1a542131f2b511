"""Parameters, gradients, masters and moments sharded by torch's `fully_shard` (FSDP2), as DTensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from bilevel_backends.processes import Grid
from bilevel_backends.sharding.strategy import ShardingStrategy


class FullySharded(ShardingStrategy):
    """A module under `fully_shard`."""

    hooked = False  # gradients are DTensors, which FSDP puts in place when it has reduced them

    def __init__(self, module: nn.Module, grid: Grid, *, sync_each_micro_batch: bool) -> None:
        super().__init__(module)
        self.grid = grid
        self.shards = grid.shards
        self.holder = (grid.replicas.rank, grid.replicas.world_size)
        self.sync_each_micro_batch = sync_each_micro_batch
        self._units = [part for part in module.modules() if isinstance(part, FSDPModule)]

    def local(self, name: str) -> Tensor:
        """The DTensor's local shard."""
        sharded = self._sharded(name).detach()
        assert isinstance(sharded, DTensor)
        return sharded.to_local()

    def arrived(self, gradient: Tensor) -> Tensor:
        """FSDP has reduced the gradient to the mean over all processes; the sum is wanted here."""
        assert isinstance(gradient, DTensor)
        local = gradient.to_local()
        precise = local.float() if local.dtype == torch.bfloat16 else local
        return precise.mul_(self.grid.everyone.world_size)

    def begin_pass(self, *, last: bool) -> None:
        """Let FSDP accumulate whole gradients until the last micro-batch, if it shall not reduce them at each."""
        if not self.sync_each_micro_batch:
            for unit in self._units:
                unit.set_requires_gradient_sync(last, recurse=False)

    def stretch(self, name: str) -> range:
        """Whole rows, of which the first processes have as many as each other, and the last ones fewer or none."""
        p, count = self._sharded(name), self.local(name).numel()
        rows = -(-p.shape[0] // self.shards.world_size)
        start = min(self.shards.rank * rows, p.shape[0]) * (p.numel() // max(p.shape[0], 1))
        return range(start, start + count)

    def gather(self, name: str, shard: Tensor, rank: int) -> Tensor | None:
        """The full tensor; every process takes part in gathering it and all but one drop it."""
        p = self._sharded(name)
        local = shard.to(p.device_mesh.device_type)
        whole = DTensor.from_local(local, p.device_mesh, p.placements, shape=p.shape, stride=p.stride()).full_tensor()
        return whole if self.grid.everyone.rank == rank else None

    def shape(self, name: str) -> tuple[int, ...]:
        """The DTensor's shape, which is that of the whole."""
        return tuple(self.parameters[name].shape)

    def reshard(self) -> None:
        """Free what is gathered: it would be stale after the next update."""
        for unit in self._units:
            unit.reshard()

    def _sharded(self, name: str) -> DTensor:
        parameter = self.parameters[name]
        assert isinstance(parameter, DTensor)
        return parameter
