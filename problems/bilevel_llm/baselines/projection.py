"""Count sketch: a random projection that keeps inner products, at the cost of one addition for every number.

    v -> R'v,  R of shape (n, d), each row of which has a single entry ±1, in a random column

(Charikar et al. 2002; Weinberger et al. 2009, Lemma 2.)

For unit vectors the inner product of two projections is right on average, with a variance of at most 2/d. Both are exactly
those of a dense matrix of random signs (Achlioptas 2003), which needs d additions for every number, and as many signs.
"""

import numpy as np
import torch
from torch import Tensor

from bilevel.data import generator

SKETCH = 32
"""The stream of random numbers that gives columns and signs; see `bilevel.data.Stream`."""


class Projection:
    """Project `size` numbers to `dimension`. A function of the seed.

    It holds 4 bytes for each of the `size` numbers, on `device`.
    """

    def __init__(self, size: int, dimension: int, seed: int, device: torch.device | None = None) -> None:
        self.dimension = dimension
        places = generator(seed, SKETCH).integers(2 * dimension, size=size, dtype=np.int32)
        self._places = torch.from_numpy(places).to(device)  # column c with sign +: c, with sign -: c + dimension

    def __call__(self, vectors: Tensor) -> Tensor:
        """Project every row, in float32. Shapes: (n, size) -> (n, dimension)."""
        sums = vectors.new_zeros(len(vectors), 2 * self.dimension, dtype=torch.float32)
        for row, vector in zip(sums, vectors, strict=True):
            row.index_add_(0, self._places, vector.float())
        plus, minus = sums.chunk(2, dim=1)
        return plus - minus
