"""ZeRO stages 1 and 2 (Rajbhandari et al., arXiv 1910.02054): all processes hold all parameters and update a shard.

DeepSpeed's engine for these stages owns the optimizer and rebuilds it, in about a second, when the trainable set changes.
What it would add is collectives alone; so the masters, moments and gradients of the active blocks are sharded here, by the
same rule that stage 3 uses, and a switch of blocks costs milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bilevel_backends.processes import Grid
from bilevel_backends.sharding.flat import pad_to
from bilevel_backends.sharding.flat_sharding import FlatSharding


class Partitioned(FlatSharding):
    """Each process updates its flat shard of every parameter; then the processes of a group gather all shards.

    In stage 1 the accumulated gradient is whole in every process until the step; in stage 2 the gradients of a block are
    reduced and scattered as soon as autograd has them all.
    """

    def __init__(self, module: nn.Module, grid: Grid, device: torch.device, *, reduces_at_step: bool) -> None:
        super().__init__(module, grid, device, reduces_at_step=reduces_at_step)
        self._tails: dict[str, Tensor] = {}  # shards with padding; only `all_gather` brings them into the parameter

    def local(self, name: str) -> Tensor:
        """A stretch of the flattened parameter."""
        size = -(-self.parameters[name].numel() // self.shards.world_size)
        piece = self.parameters[name].detach().view(-1)[self.shards.rank * size :][:size]
        if piece.numel() == size:
            return piece
        if name not in self._tails:
            self._tails[name] = pad_to(piece, size).clone()
        return self._tails[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """The parameter's shape."""
        return tuple(self.parameters[name].shape)

    def all_gather(self, names: Sequence[str]) -> None:
        """Copy the shards of all processes into the parameters, which have one precision."""
        if not names:
            return
        layout = self.layout(names)
        message = self.shards.all_gather(torch.cat([self.local(name) for name in names]))
        for name in names:
            for place, piece in layout.pieces(message, name, self.parameters[name].detach().view(-1)):
                piece.copy_(place)
