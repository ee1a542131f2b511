"""Write float32 values to bfloat16 without losing small updates: stochastic rounding with common random numbers.

An update of 1e-6 on a weight of 0.02 is a hundredth of the spacing of bfloat16 there; rounding to nearest drops it every
time. Rounding up with a probability equal to the remainder keeps it in expectation. Replicas use the same random numbers
at the same step: their difference, which the penalty multiplies, has rounding errors only where the two round differently.
"""

import torch
from torch import Tensor


def round_stochastically(values: Tensor, noise: torch.Generator) -> Tensor:
    """The bfloat16 neighbors of float32 `values`, each chosen with the probability that makes the mean exact.

    Values that bfloat16 can hold are returned as they are. Any shape; same device as the generator.
    """
    # bfloat16 is the upper half of a float32: add a random lower half and drop it; the carry is the rounding up.
    lower = torch.randint(0, 1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=noise)
    bits = values.view(torch.int32).add(lower).bitwise_and_(-(1 << 16))
    return bits.view(torch.float32).to(torch.bfloat16)
