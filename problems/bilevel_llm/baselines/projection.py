"""Johnson-Lindenstrauss: a random projection that keeps inner products, whose matrix is never stored whole.

    v -> R'v / √d,  R of shape (n, d) with independent entries ±1 (Rademacher; Achlioptas 2003)

For unit vectors the inner product of two projections is right on average, with a variance of at most 2/d.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bilevel.data import generator

SIGNS = 32
"""The stream of random numbers that gives the signs; see `bilevel.data.Stream`."""

_BLOCK = 1 << 24  # signs made at a time: 64 MiB as float32


@dataclass(frozen=True)
class Projection:
    """Project `size` numbers to `dimension`. The signs follow from the seed and are made anew at every call, block by block.

    dimension: a positive multiple of 8, because a byte gives eight signs.
    """

    size: int
    dimension: int
    seed: int

    def __post_init__(self) -> None:
        if self.dimension < 8 or self.dimension % 8:
            raise ValueError(f"dimension must be a positive multiple of 8, not {self.dimension}")

    def __call__(self, vectors: Tensor) -> Tensor:
        """Project every row, in float32. Shapes: (n, size) -> (n, dimension)."""
        projected = vectors.new_zeros(len(vectors), self.dimension, dtype=torch.float32)
        rows = max(1, _BLOCK // self.dimension)
        for block, start in enumerate(range(0, self.size, rows)):
            part = vectors[:, start : start + rows].float()
            projected += part @ self._signs(block, part.shape[1], vectors.device)
        return projected / math.sqrt(self.dimension)

    def _signs(self, block: int, rows: int, device: torch.device) -> Tensor:
        """Entries ±1. Shape: (rows, dimension)."""
        raw = generator(self.seed, SIGNS, block).bytes(rows * self.dimension // 8)
        packed = torch.from_numpy(np.frombuffer(raw, np.uint8).copy()).to(device).unsqueeze(1)
        bits: Tensor = (packed >> torch.arange(8, device=device, dtype=torch.uint8)) & 1
        return bits.view(rows, self.dimension).float().mul_(2).sub_(1)
