"""Flat shards: a tensor is flattened, padded with zeros and divided into shards of equal size, one a process."""

import torch.nn.functional as F
from torch import Tensor


def flat_shard(flat: Tensor, size: int, rank: int) -> Tensor:
    """The shard of process `rank`, padded with zeros where the tensor ends. Shapes: (n,) -> (size,)."""
    return pad_to(flat[rank * size : (rank + 1) * size], size)


def pad_to(flat: Tensor, length: int) -> Tensor:
    """The tensor with zeros appended up to `length`. Shapes: (n,) -> (length,)."""
    return F.pad(flat, (0, length - flat.numel())) if flat.numel() < length else flat
