"""The upper variable: one logit for each data source."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from bilevel import InputError


class SourceWeights(nn.Module):
    """p_i = floor + (1 - k * floor) * softmax(logits)_i.

    initial: weights to start from, positive, summing to 1. Shape: (k,).
    floor: smallest weight a source can get. A floor above 0 keeps every source alive.

    The logits are float64: their gradient is a small difference of large terms, summed over micro-batches.
    """

    def __init__(self, initial: Tensor, floor: float = 0.0) -> None:
        super().__init__()
        self.floor = floor
        self.logits = nn.Parameter(logits_of(initial, floor))

    def forward(self) -> Tensor:
        """The weights. Shape: (k,)."""
        return self.floor + (1 - len(self.logits) * self.floor) * torch.softmax(self.logits, 0)


def logits_of(weights: Tensor, floor: float) -> Tensor:
    """The logits, with mean 0, that give these weights. Shape: (k,) -> (k,)."""
    logits = free_part(weights, floor).log()
    return logits - logits.mean()


def free_part(weights: Tensor, floor: float) -> Tensor:
    """What of the weights is above the floor, as weights: positive, summing to 1. Shape: (k,) -> (k,)."""
    return ((weights.double() - floor) / (1 - len(weights) * floor)).clamp_min(1e-12)


def named_distribution(rule: str | Mapping[str, float], names: Sequence[str], sizes: Sequence[int], key: str) -> Tensor:
    """Weights given as "uniform", "size" (in proportion to rows) or by name. Shape: (k,), float64.

    Raises `InputError`, naming `key`, if names are missing or unknown or a weight is not positive.
    """
    if rule == "uniform":
        return torch.full((len(names),), 1 / len(names), dtype=torch.float64)
    if rule == "size":
        return torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
    if not isinstance(rule, Mapping):
        raise InputError(f"{key} is {rule!r}; it can be uniform, size, or a weight for every source")
    if set(rule) != set(names):
        odd = sorted(set(rule) ^ set(names))[0]
        raise InputError(f"{key}: {odd!r} is {'not a source' if odd in rule else 'missing'}; name every source once")
    weights = torch.tensor([float(rule[name]) for name in names], dtype=torch.float64)
    if not bool((weights > 0).all()):
        raise InputError(f"{key}: every weight must be positive, for a softmax cannot reach 0; use a small one instead")
    return weights / weights.sum()


def divergence(weights: Tensor, prior: Tensor) -> Tensor:
    """KL(weights || prior). Shapes: (k,), (k,) -> ()."""
    return (weights * (weights / prior).log()).sum()
