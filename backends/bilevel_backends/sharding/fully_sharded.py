"""Parameters, gradients, masters and moments sharded by torch's `fully_shard` (FSDP2), as DTensors."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from bilevel_backends.processes import Processes
from bilevel_backends.sharding.strategy import ShardingStrategy


class FullySharded(ShardingStrategy):
    """A module under `fully_shard`."""

    whole = False
    hooked = False  # gradients are DTensors, which FSDP puts in place when it has reduced them

    def __init__(self, module: nn.Module, processes: Processes) -> None:
        super().__init__(module)
        self.processes = processes
        self.holder = next((_holder(p) for p in self.parameters.values() if isinstance(p, DTensor)), (0, 1))

    def local(self, name: str) -> Tensor:
        """The DTensor's local shard."""
        sharded = self._sharded(name).detach()
        assert isinstance(sharded, DTensor)
        return sharded.to_local()

    def reduce(self, name: str, gradient: Tensor) -> Tensor:
        """FSDP has reduced the gradient to the mean over processes; the sum is wanted here."""
        assert isinstance(gradient, DTensor)
        return gradient.to_local() * self.processes.world_size

    def stretch(self, name: str) -> range:
        """Whole rows, of which the first processes have as many as each other, and the last ones fewer or none."""
        p, count = self._sharded(name), self.local(name).numel()
        split = next(i for i, placement in enumerate(p.placements) if placement.is_shard())
        rows = -(-p.shape[0] // p.device_mesh.size(split))
        start = min(p.device_mesh.get_local_rank(split) * rows, p.shape[0]) * (p.numel() // max(p.shape[0], 1))
        return range(start, start + count)

    def gather(self, name: str, shard: Tensor, rank: int) -> Tensor | None:
        """The full tensor; every process takes part in gathering it and all but one drop it."""
        p = self._sharded(name)
        local = shard.to(p.device_mesh.device_type)
        whole = DTensor.from_local(local, p.device_mesh, p.placements, shape=p.shape, stride=p.stride()).full_tensor()
        return whole if self.processes.rank == rank else None

    def shape(self, name: str) -> tuple[int, ...]:
        """The DTensor's shape, which is that of the whole."""
        return tuple(self.parameters[name].shape)

    def reshard(self) -> None:
        """Free what is gathered: it would be stale after the next update."""
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _sharded(self, name: str) -> DTensor:
        parameter = self.parameters[name]
        assert isinstance(parameter, DTensor)
        return parameter


def _holder(p: DTensor) -> tuple[int, int]:
    """Which of the processes with this shard this one is, and how many they are: the mesh may replicate what it shards."""
    index, count = 0, 1
    for dim, placement in enumerate(p.placements):
        if placement.is_replicate():
            size = p.device_mesh.size(dim)
            index, count = index * size + p.device_mesh.get_local_rank(dim), count * size
    return index, count
