"""`hyper-cleaning`: which training rows have a wrong label? A weight for each row.

The task is that of Franceschi et al. (arXiv 1703.01785):

    g(x, y) = mean_i σ(x_i) · crossentropy_i(y) + ½ ρ‖W‖²          f(y) = mean crossentropy over clean validation rows

y is a linear classifier with weights W. The data are scikit-learn's handwritten digits, with some labels made wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bilevel.data import Stream, generator
from bilevel.errors import InputError
from bilevel.problem import Forward, Problem, Shard
from bilevel_problems.tables import Rows, RowTable

CLASSES = 10


class SampleWeights(nn.Module):
    """A logit for each training row; a call with row numbers returns σ(logit) of these rows."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(rows, dtype=torch.float64))

    def forward(self, numbers: Tensor | None = None) -> Tensor:
        """The weights of these rows; of all rows by default."""
        logits = self.logits if numbers is None else self.logits[numbers]
        return torch.sigmoid(logits)


class Classifier(nn.Module):
    """A linear classifier; a call returns the scores and ½‖W‖²."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, CLASSES, dtype=torch.float64)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Shapes: (rows, d) -> (rows, classes), ()."""
        return self.linear(features), 0.5 * (self.linear.weight**2).sum()


@dataclass
class HyperCleaning(Problem[Rows]):
    """Find the wrong labels among handwritten digits.

    rows: the number of training rows.
    wrong: the share of them whose label is replaced by another one.
    validation_rows: the number of rows with right labels.
    ridge: ρ.
    batch_size: the rows of a batch of either level; None takes all.
    instance: the seed of the split and of the wrong labels.
    """

    rows: int = 500
    wrong: float = 0.4
    validation_rows: int = 200
    ridge: float = 0.01
    batch_size: int | None = None
    instance: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.wrong < 1:
            raise ValueError(f"wrong must be at least 0 and below 1, not {self.wrong}")
        if min(self.rows, self.validation_rows) < 1:
            raise ValueError("rows and validation_rows must be at least 1")

    def prepare(self) -> None:
        """Load the digits, and make some labels wrong."""
        _ = self._data

    @property
    def training(self) -> RowTable:
        """The rows of the lower level, some of which have wrong labels."""
        return self._data[0]

    @property
    def validation(self) -> RowTable:
        """The rows of the upper level."""
        return self._data[1]

    @property
    def is_wrong(self) -> Tensor:
        """Which training labels are wrong. Shape: (rows,)."""
        return self._data[2]

    def upper(self) -> nn.Module:
        """The variable x: the logits of the rows, which start at 0 (weight ½)."""
        return SampleWeights(self.rows)

    def lower(self) -> nn.Module:
        """The variable y: the classifier, whose weights start at 0."""
        return Classifier(self.training.features.shape[1])

    def upper_loss(self, x: Forward, y: Forward, batch: Rows) -> Tensor:
        """f(y)."""
        scores, _ = y(batch.features)
        return batch.weight.dot(F.cross_entropy(scores, batch.targets, reduction="none"))

    def lower_loss(self, x: Forward, y: Forward, batch: Rows) -> Tensor:
        """g(x, y)."""
        scores, half_norm = y(batch.features)
        losses = F.cross_entropy(scores, batch.targets, reduction="none")
        numbers = None if self.batch_size is None and batch.share == 1 else batch.number  # all rows are in order
        return torch.dot(batch.weight * x(numbers), losses) + self.ridge * batch.share * half_norm

    def upper_batch(self, index: int, shard: Shard) -> Sequence[Rows]:
        """Validation rows."""
        return self.validation.batch(index, shard, self.batch_size, Stream.UPPER)

    def lower_batch(self, index: int, shard: Shard) -> Sequence[Rows]:
        """Training rows."""
        return self.training.batch(index, shard, self.batch_size, Stream.LOWER)

    def summary(self, x: Forward) -> Mapping[str, float]:
        """The mean weight of the rows with right labels, and of those with wrong ones."""
        weights, wrong = x(), self.is_wrong
        means = {"right": weights[~wrong], "wrong": weights[wrong]}
        return {name: float(values.mean()) for name, values in means.items() if len(values)}

    @cached_property
    def _data(self) -> tuple[RowTable, RowTable, Tensor]:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise InputError(
                "the problem 'hyper-cleaning' reads its digits from scikit-learn, which is not installed; "
                "install bilevel[synthetic]"
            ) from error
        digits = load_digits()
        images, labels = digits.data / 16, digits.target
        if self.rows + self.validation_rows > len(labels):
            raise InputError(
                f"rows ({self.rows}) and validation_rows ({self.validation_rows}) add up to more than the "
                f"{len(labels)} digits"
            )
        random = generator(self.instance, Stream.INIT)
        order = random.permutation(len(labels))
        train, held = order[: self.rows], order[self.rows :][: self.validation_rows]
        wrong = np.zeros(self.rows, dtype=bool)
        wrong[random.permutation(self.rows)[: round(self.wrong * self.rows)]] = True
        noisy = np.where(wrong, (labels[train] + random.integers(1, CLASSES, self.rows)) % CLASSES, labels[train])
        return (
            RowTable(torch.from_numpy(images[train]), torch.from_numpy(noisy), (self.rows,)),
            RowTable(torch.from_numpy(images[held]), torch.from_numpy(labels[held]), (self.validation_rows,)),
            torch.from_numpy(wrong),
        )
