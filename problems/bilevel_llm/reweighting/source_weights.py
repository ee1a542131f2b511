"""Weights of data sources, as a recipe gives them and as an upper loss pulls them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bilevel import InputError


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
