"""An upper variable that is a distribution: the weights of named things, such as sources of training data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

SMALLEST = 1e-12  # of a free part: its logarithm, and what a gradient is divided by, stay finite


class Distribution(nn.Module):
    """p_i = floor + (1 - k * floor) * q_i, with q = softmax(logits).

    names: what has a weight, in order; k of them.
    initial: the weights to start from, above the floor, summing to 1; None: all equal. Shape: (k,).
    floor: the smallest weight that one can get. A floor above 0 keeps all of them alive.
    prior: the weights that a solver may pull towards, above the floor; None: all equal. Shape: (k,).

    The logits are float64: their gradient is a small difference of large terms, summed over micro-batches.
    """

    def __init__(
        self, names: Sequence[str], initial: Tensor | None = None, *, floor: float = 0.0, prior: Tensor | None = None
    ) -> None:
        super().__init__()
        self.names = list(names)
        self.floor = floor
        uniform = torch.full((len(self.names),), 1 / len(self.names), dtype=torch.float64)
        self.prior = free_part(uniform if prior is None else prior, floor)
        self.logits = nn.Parameter(logits_of(uniform if initial is None else initial, floor))

    def forward(self) -> Tensor:
        """The weights p. Shape: (k,)."""
        return self.floor + (1 - len(self.names) * self.floor) * self.free()

    def free(self) -> Tensor:
        """What of the weights is above the floor, as a distribution: q. Shape: (k,)."""
        return torch.softmax(self.logits, 0)

    def signal(self, gradient: Tensor) -> Tensor:
        """What pushes each weight up: minus the derivative of a loss in q, less its mean under q. Shape: (k,) -> (k,).

        gradient: the loss's gradient in the logits, which is q_i times as large: it fades with the weight, and with the
            number of weights, where the signal does not.
        """
        return -gradient / self.free().detach().clamp_min(SMALLEST)


def logits_of(weights: Tensor, floor: float) -> Tensor:
    """The logits, with mean 0, that give these weights. Shape: (k,) -> (k,)."""
    logits = free_part(weights, floor).log()
    return logits - logits.mean()


def free_part(weights: Tensor, floor: float) -> Tensor:
    """What of the weights is above the floor, as weights: positive, summing to 1. Shape: (k,) -> (k,)."""
    return ((weights.double() - floor) / (1 - len(weights) * floor)).clamp_min(SMALLEST)
