"""Token rows of different lengths as one matrix, and the places in it from which a token is predicted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class PaddedRows:
    """Rows padded on the right: under causal attention no token sees what follows it, so no mask is needed.

    ids: Shape: (rows, length).
    positions: the places, in the flattened (rows * length), from which a target is predicted. Shape: (targets,).
    targets: the tokens to predict there, row by row. Shape: (targets,).
    row: the row that every target belongs to. Shape: (targets,).
    """

    ids: Tensor
    positions: Tensor
    targets: Tensor
    row: Tensor

    @classmethod
    def of(cls, rows: Sequence[tuple[NDArray[np.int32], NDArray[np.bool_]]]) -> PaddedRows:
        """From the ids and labels of every row (as `TokenTable.row` gives them)."""
        ids = np.zeros((len(rows), max(len(tokens) for tokens, _ in rows)), np.int64)
        for padded, (tokens, _) in zip(ids, rows, strict=True):
            padded[: len(tokens)] = tokens
        predicting = [np.flatnonzero(labels[1:]) for _, labels in rows]  # the places before what is labelled
        places = np.concatenate(predicting)
        row = np.repeat(np.arange(len(rows)), list(map(len, predicting)))
        return cls(*map(torch.from_numpy, (ids, row * ids.shape[1] + places, ids[row, places + 1], row)))


def as_ids(tokens: Sequence[int] | NDArray[np.int32]) -> Tensor:
    """Token ids in the type that models take. Shape: (tokens,)."""
    return torch.tensor(tokens, dtype=torch.int64)


def predicting_places(labels: NDArray[np.bool_]) -> Tensor:
    """From where in a row its labelled tokens are predicted: the places before them. Shapes: (tokens,) -> (targets,)."""
    return torch.from_numpy(np.flatnonzero(labels[1:]))
