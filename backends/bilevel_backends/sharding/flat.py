"""Flat shards: a tensor is flattened, padded with zeros and divided into shards of equal size, one a process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch.nn.functional as F
from torch import Tensor


def flat_stretch(length: int, size: int, rank: int) -> range:
    """Which of a flattened tensor's numbers the shard of process `rank` holds, before its padding."""
    return range(min(rank * size, length), min((rank + 1) * size, length))


def pad_to(flat: Tensor, length: int) -> Tensor:
    """The tensor with zeros appended up to `length`. Shapes: (n,) -> (length,)."""
    return F.pad(flat, (0, length - flat.numel())) if flat.numel() < length else flat


class FlatLayout:
    """Where several tensors lie in one message: a matrix with a row for each process, in which their shards follow each
    other.

    sizes: name -> the size of the tensor's shards.
    size: the length of a row.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.sizes = sizes
        self.size = 0
        self._starts: dict[str, int] = {}
        for name, size in sizes.items():
            self._starts[name] = self.size
            self.size += size

    def shard(self, row: Tensor, name: str) -> Tensor:
        """The tensor's shard in a row, as a view. Shapes: (size of a row,) -> (size of the shard,)."""
        return row[self._starts[name] :][: self.sizes[name]]

    def pieces(self, message: Tensor, name: str, flat: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The same numbers in both places, as pairs of views: in the message, and in the flattened tensor.

        They come in pieces, as the last shards are padded in the message alone.
        """
        start, size = self._starts[name], self.sizes[name]
        columns = message[:, start : start + size]
        rows, rest = divmod(flat.numel(), size) if size else (0, 0)
        if rows:
            yield columns[:rows], flat[: rows * size].view(rows, size)
        if rest:
            yield columns[rows, :rest], flat[rows * size :]
