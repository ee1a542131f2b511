"""A checksum of a tensor that can be summed up from its shards, on the devices where they are."""

import torch
from torch import Tensor

CHUNK = 1 << 22
"""The numbers that are hashed at a time. They take 16 bytes each meanwhile."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(values: Tensor, start: int = 0) -> Tensor:
    """A sum over numbers of a hash of their bits and places, modulo 2^64. Shapes: (n,) -> ().

    A sum of the bits alone would not see that two numbers were exchanged.

    start: where in the whole tensor, flattened, these numbers begin. The checksum of the whole is the sum of those of its
        parts, as 64-bit integers that wrap around.
    """
    bits = values.detach().view(_BITS[values.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for first in range(0, len(bits), CHUNK):
        part = bits[first : first + CHUNK].to(torch.int64)
        place = torch.arange(start + first, start + first + len(part), device=bits.device)
        mixed = (part + 0x9E3779B97F4A7C).mul_(place.mul_(0x2545F4914F6CDD1D).bitwise_or_(1))
        total += mixed.bitwise_xor_(mixed >> 29).sum()
    return total


def written(total: int) -> str:
    """A checksum as text."""
    return f"{total % 2**64:016x}"
