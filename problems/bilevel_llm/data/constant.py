"""A tensor that losses need in every micro-batch, where they compute."""

import torch
from torch import Tensor


class Constant:
    """A tensor that is copied to a device, and converted, once: a copy in every micro-batch would hold up a GPU's queue.

    value: the tensor, on the CPU.
    """

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self._copies: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def like(self, other: Tensor) -> Tensor:
        """The tensor on the device and in the precision of another. It is not to be changed."""
        where = (other.device, other.dtype)
        if where not in self._copies:
            self._copies[where] = self.value.to(other)
        return self._copies[where]
