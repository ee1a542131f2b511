"""Gradients on their way to the other processes: those of a block go together, in one message."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bilevel_backends.sharding.flat import FlatLayout


class Bucket:
    """The gradients of some parameters, summed over whatever this process has computed, and not over processes yet.

    Processes may have gradients of different parameters (an expert to which none of the tokens went has none), and all
    send the same message: each row ends with a number for every parameter, which says how many processes had a gradient.
    """

    def __init__(self, layout: FlatLayout, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self.layout = layout
        self.message = torch.zeros(rows, layout.size + len(layout.sizes), dtype=dtype, device=device)
        self._missing = set(layout.sizes)

    @property
    def complete(self) -> bool:
        """Whether every parameter has a gradient."""
        return not self._missing

    @property
    def empty(self) -> bool:
        """Whether no parameter has one."""
        return len(self._missing) == len(self.layout.sizes)

    def add(self, name: str, gradient: Tensor, weight: float) -> None:
        """Add weight * gradient."""
        for place, piece in self.layout.pieces(self.message, name, gradient.reshape(-1)):
            place.add_(piece, alpha=weight)
        self._missing.discard(name)

    def announce(self) -> Tensor:
        """The message, with what is missing said in it."""
        counts = self.message[:, self.layout.size :]
        counts.fill_(1)
        for column, name in enumerate(self.layout.sizes):
            if name in self._missing:
                counts[:, column] = 0
        return self.message

    def shards(self, row: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The parameters of which any process had a gradient, and their shards, in this process's row of the sum."""
        names: Sequence[str] = list(self.layout.sizes)
        if self._missing:  # otherwise this process knows, and need not wait for the numbers
            names = [name for name, count in zip(names, row[self.layout.size :].tolist(), strict=True) if count]
        return ((name, self.layout.shard(row, name)) for name in names)
