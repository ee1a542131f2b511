"""ZeRO stages 0 to 2 (Rajbhandari et al., arXiv 1910.02054): every process has all parameters.

DeepSpeed's engine for these stages owns the optimizer and rebuilds it, in about a second, when the trainable set changes.
What it would bring besides is collectives; so the active blocks' masters, moments and gradients are split here, by the
same rule that stage 3 uses, and a switch of blocks costs milliseconds.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from bilevel_backends.processes import Processes
from bilevel_backends.sharding.strategy import Layout


def stretch(flat: Tensor, size: int, rank: int) -> Tensor:
    """Stretch number `rank` of `size` elements; zeros where the tensor has ended. Shapes: (n,) -> (size,)."""
    piece = flat[rank * size : (rank + 1) * size]
    return F.pad(piece, (0, size - piece.numel())) if piece.numel() < size else piece


def padded(flat: Tensor, length: int) -> Tensor:
    """With zeros up to `length`. Shapes: (n,) -> (length,)."""
    return F.pad(flat, (0, length - flat.numel())) if flat.numel() < length else flat


class Replicated(Layout):
    """Stage 0, and every variable that is not sharded: all processes hold and update the same."""

    deferred = True

    def __init__(self, module: nn.Module, processes: Processes) -> None:
        super().__init__(module)
        self.processes = processes

    def part(self, name: str) -> Tensor:
        """The parameter."""
        return self.parameters[name].detach()

    def reduce(self, name: str, gradient: Tensor) -> Tensor:
        """All-reduce."""
        return self.processes.sum(gradient.contiguous())

    def cut(self, name: str, whole: Tensor) -> Tensor:
        """All of it."""
        return whole

    def join(self, name: str, part: Tensor, rank: int) -> Tensor | None:
        """Everybody has it."""
        return part if self.processes.rank == rank else None

    def shape(self, name: str) -> tuple[int, ...]:
        """As it is."""
        return tuple(self.parameters[name].shape)


class Partitioned(Layout):
    """Stages 1 and 2: each process updates a stretch of every parameter; then all gather the stretches.

    In stage 1 the accumulated gradient is whole in every process until the step; in stage 2 each gradient is summed and
    cut as soon as autograd has it.
    """

    whole = False

    def __init__(self, module: nn.Module, processes: Processes, *, deferred: bool) -> None:
        super().__init__(module)
        self.processes = processes
        self.deferred = deferred
        self._tails: dict[str, Tensor] = {}  # parts with padding; only `publish` brings them into the parameter

    def part(self, name: str) -> Tensor:
        """A stretch of the parameter."""
        size = self._size(name)
        piece = self.parameters[name].detach().view(-1)[self.processes.rank * size :][:size]
        if piece.numel() == size:
            return piece
        if name not in self._tails:
            self._tails[name] = padded(piece, size).clone()
        return self._tails[name]

    def reduce(self, name: str, gradient: Tensor) -> Tensor:
        """Reduce-scatter."""
        length = self._size(name) * self.processes.world_size
        return self.processes.sum_scatter(padded(gradient.reshape(-1), length).contiguous())

    def cut(self, name: str, whole: Tensor) -> Tensor:
        """A stretch."""
        return stretch(whole.reshape(-1), self._size(name), self.processes.rank)

    def join(self, name: str, part: Tensor, rank: int) -> Tensor | None:
        """Gather the stretches."""
        joined = self.processes.join_at(part, rank)
        return None if joined is None else joined[: self.parameters[name].numel()].view(self.shape(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """As it is."""
        return tuple(self.parameters[name].shape)

    def publish(self, name: str) -> None:
        """All-gather the stretches into everybody's parameter."""
        flat = self.parameters[name].detach().view(-1)
        flat.copy_(self.processes.join(self.part(name))[: flat.numel()])

    def _size(self, name: str) -> int:
        return -(-self.parameters[name].numel() // self.processes.world_size)
