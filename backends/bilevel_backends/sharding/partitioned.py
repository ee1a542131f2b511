"""ZeRO stages 1 and 2 (Rajbhandari et al., arXiv 1910.02054): all processes hold all parameters and update a shard.

DeepSpeed's engine for these stages owns the optimizer and rebuilds it, in about a second, when the trainable set changes.
What it would add is collectives alone; so the masters, moments and gradients of the active blocks are sharded here, by the
same rule that stage 3 uses, and a switch of blocks costs milliseconds.
"""

from __future__ import annotations

from torch import Tensor, nn

from bilevel_backends.processes import Processes
from bilevel_backends.sharding.flat import flat_stretch, pad_to
from bilevel_backends.sharding.strategy import ShardingStrategy


class Partitioned(ShardingStrategy):
    """Each process updates its flat shard of every parameter; then all processes gather all shards.

    In stage 1 the accumulated gradient is whole in every process until the step; in stage 2 each gradient is reduced and
    scattered as soon as autograd has it.
    """

    whole = False

    def __init__(self, module: nn.Module, processes: Processes, *, reduces_at_step: bool) -> None:
        super().__init__(module)
        self.processes = processes
        self.reduces_at_step = reduces_at_step
        self._tails: dict[str, Tensor] = {}  # shards with padding; only `all_gather` brings them into the parameter

    def local(self, name: str) -> Tensor:
        """A stretch of the flattened parameter."""
        size = self._size(name)
        piece = self.parameters[name].detach().view(-1)[self.processes.rank * size :][:size]
        if piece.numel() == size:
            return piece
        if name not in self._tails:
            self._tails[name] = pad_to(piece, size).clone()
        return self._tails[name]

    def reduce(self, name: str, gradient: Tensor) -> Tensor:
        """Reduce-scatter."""
        length = self._size(name) * self.processes.world_size
        return self.processes.reduce_scatter(pad_to(gradient.reshape(-1), length).contiguous())

    def stretch(self, name: str) -> range:
        """As many as the others hold, but for the padding."""
        return flat_stretch(self.parameters[name].numel(), self._size(name), self.processes.rank)

    def gather(self, name: str, shard: Tensor, rank: int) -> Tensor | None:
        """The shards one after the other, without the padding."""
        gathered = self.processes.gather(shard, rank)
        return None if gathered is None else gathered[: self.parameters[name].numel()].view(self.shape(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """The parameter's shape."""
        return tuple(self.parameters[name].shape)

    def all_gather(self, name: str) -> None:
        """Copy the shards of all processes into the parameter."""
        flat = self.parameters[name].detach().view(-1)
        flat.copy_(self.processes.all_gather(self.local(name))[: flat.numel()])

    def _size(self, name: str) -> int:
        return -(-self.parameters[name].numel() // self.processes.world_size)
