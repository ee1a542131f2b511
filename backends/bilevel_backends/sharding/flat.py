"""Flat shards: a tensor is flattened, padded with zeros and divided into shards of equal size, one a process."""

import torch.nn.functional as F
from torch import Tensor


def flat_stretch(length: int, size: int, rank: int) -> range:
    """Which of a flattened tensor's numbers the shard of process `rank` holds, before its padding."""
    return range(min(rank * size, length), min((rank + 1) * size, length))


def pad_to(flat: Tensor, length: int) -> Tensor:
    """The tensor with zeros appended up to `length`. Shapes: (n,) -> (length,)."""
    return F.pad(flat, (0, length - flat.numel())) if flat.numel() < length else flat
