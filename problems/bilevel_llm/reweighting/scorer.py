"""A small network that scores rows by their features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Standardized:
    """Features of all rows with mean 0 and standard deviation 1 over the rows; a constant feature is 0.

    values: Shape: (rows, d).
    mean, scale: values * scale + mean are the features as they were. Shapes: (d,).
    """

    values: NDArray[np.float64]
    mean: NDArray[np.float64]
    scale: NDArray[np.float64]

    @classmethod
    def of(cls, features: NDArray[np.float64]) -> Standardized:
        """Standardize the columns. Shape: (rows, d)."""
        mean, deviation = features.mean(0), features.std(0)
        constant = deviation <= 1e-12 * np.maximum(1.0, np.abs(mean))
        scale = np.where(constant, 1.0, deviation)
        return cls(np.where(constant, 0.0, (features - mean) / scale), mean, scale)


class Scorer(nn.Module):
    """The score of every row: w · φ_r, or w · tanh(A φ_r + b) with a hidden layer.

    features: φ, standardized. Shape: (rows, d).
    hidden: units of the hidden layer; 0 for none.

    w starts at 0, so that all rows score alike. There is no last bias: a softmax over scores would not see it.
    """

    features: Tensor

    def __init__(self, features: Tensor, hidden: int = 0) -> None:
        super().__init__()
        self.register_buffer("features", features, persistent=False)
        width = features.shape[1]
        self.hidden = nn.Linear(width, hidden, dtype=torch.float64) if hidden else None
        self.out = nn.Linear(hidden or width, 1, bias=False, dtype=torch.float64)
        nn.init.zeros_(self.out.weight)

    def forward(self) -> Tensor:
        """Shape: (rows,)."""
        inner = self.features if self.hidden is None else torch.tanh(self.hidden(self.features))
        return self.out(inner).squeeze(1)  # type: ignore[no-any-return]


def describe(scorer: Scorer, names: Sequence[str], features: Standardized) -> dict[str, Any]:
    """The scorer as plain data, enough to score other rows.

    A linear scorer has a `weight` for every feature: the change of a row's log weight by one standard deviation of it.
    """
    table: dict[str, dict[str, float]] = {
        name: {"mean": float(mean), "scale": float(scale)}
        for name, mean, scale in zip(names, features.mean, features.scale, strict=True)
    }
    out = scorer.out.weight[0].tolist()
    if scorer.hidden is None:
        for name, weight in zip(names, out, strict=True):
            table[name]["weight"] = weight
        return {"features": table}
    layers: Mapping[str, Any] = {
        "matrix": scorer.hidden.weight.tolist(),
        "bias": scorer.hidden.bias.tolist(),
        "out": out,
    }
    return {"features": table, "tanh": layers}
