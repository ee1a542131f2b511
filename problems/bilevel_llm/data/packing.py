"""Which places of padded rows have to be computed: those that a prediction needs, and of equal ones a single one."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Under causal attention, what a model computes at a place of a row is a function of the tokens up to there.

    Where two rows begin alike, as rows do that a chat template or an instruction opens, their common places are therefore
    computed once. Padding, and what follows the last place from which a row predicts anything, is not computed at all.

    row, place: where in the rows each computed token stands. Shape: (tokens,).
    token: the number of the computed token that stands for each place of each row, and 0 for places that are not needed.
        Shape: (rows, length), with the length of the longest needed part of a row.
    """

    row: Tensor
    place: Tensor
    token: Tensor

    @classmethod
    def of(cls, ids: Tensor, positions: Tensor) -> Packing:
        """For rows from which something is predicted.

        ids: Shape: (rows, length). positions: the places, in the flattened (rows * length), that predict. Shape: (n,).
        """
        predicting, place = np.divmod(positions.numpy(), ids.shape[1])
        needed = np.zeros(len(ids), np.int64)
        np.maximum.at(needed, predicting, place + 1)
        length = int(needed.max())
        inside = np.arange(length) < needed[:, None]
        rows = np.where(inside, ids.numpy()[:, :length], -1)
        # in lexicographic order, the row before a row is one of those with which it shares most
        order = _lexicographic(rows + 1)
        differs = np.ones((len(rows), length), np.bool_)
        differs[order[1:]] = np.logical_or.accumulate(rows[order[1:]] != rows[order[:-1]], axis=1)
        new = inside & differs
        token = np.zeros((len(rows), length), np.int64)
        token[new] = np.arange(new.sum())
        for before, row in itertools.pairwise(order):
            shared = ~differs[row]
            token[row, shared] = token[before, shared]
        return cls(*(torch.from_numpy(found) for found in (*np.nonzero(new), token)))

    def to(self, device: torch.device) -> Packing:
        """The same on a device."""
        return Packing(self.row.to(device), self.place.to(device), self.token.to(device))


def _lexicographic(rows: NDArray[np.int64]) -> NDArray[np.intp]:
    """The order of rows of numbers from 0 to 2^32 - 1; equal ones stay as they are. Shapes: (rows, length) -> (rows,).

    The bytes of such numbers, largest first, are in the order of the numbers: comparing rows byte by byte is some thirty
    times quicker than `numpy.lexsort`, which sorts once for every column.
    """
    big_endian = np.ascontiguousarray(rows, ">u4")
    return np.argsort(big_endian.view(f"V{4 * rows.shape[1]}").ravel(), kind="stable")
