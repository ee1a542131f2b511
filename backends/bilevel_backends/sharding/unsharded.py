"""One process, which holds everything."""

from __future__ import annotations

from torch import Tensor

from bilevel_backends.sharding.strategy import ShardingStrategy


class Unsharded(ShardingStrategy):
    """There are no other processes to share parameters with."""

    whole = True

    def local(self, name: str) -> Tensor:
        """The parameter."""
        return self.parameters[name].detach()

    def stretch(self, name: str) -> range:
        """All."""
        return range(self.parameters[name].numel())

    def gather(self, name: str, shard: Tensor, rank: int) -> Tensor | None:
        """The tensor, which is whole already."""
        return shard

    def shape(self, name: str) -> tuple[int, ...]:
        """The parameter's shape."""
        return tuple(self.parameters[name].shape)
