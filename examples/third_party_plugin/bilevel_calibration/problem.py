"""Calibrate a sensor: which offset x makes an estimate from its readings agree with a trusted instrument?"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bilevel import Forward, Problem, Shard


class Number(nn.Module):
    """A variable that holds one number."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(()))

    def forward(self) -> Tensor:
        return self.value * 1  # a new tensor: a backend may free the parameter after the forward


@dataclass(frozen=True)
class Calibration(Problem[Tensor]):
    """
    min_x  mean (y*(x) - reference)^2 / 2 + ridge x^2 / 2    with    y*(x) = argmin_y  mean (y - reading - x)^2 / 2

    Both levels are strongly convex quadratics: y*(x) = mean(readings) + x, and the solution is
    x* = (mean(references) - mean(readings)) / (1 + ridge).

    The fields are the keys that a recipe may set:
    readings: readings of the sensor.
    references: readings of the trusted instrument.
    ridge: how reluctant we are to correct the sensor.
    """

    readings: tuple[float, ...]
    references: tuple[float, ...]
    ridge: float = 0.0

    def upper(self) -> Number:
        return Number()

    def lower(self) -> Number:
        return Number()

    # A loss sees one micro-batch; over all micro-batches it has to add up to the mean, hence the division by the size
    # of the whole batch. (The ridge is inside the sum for the same reason.)
    def upper_loss(self, x: Forward, y: Forward, batch: Tensor) -> Tensor:
        loss: Tensor = ((y() - batch) ** 2 + self.ridge * x() ** 2).sum() / (2 * len(self.references))
        return loss

    def lower_loss(self, x: Forward, y: Forward, batch: Tensor) -> Tensor:
        loss: Tensor = ((y() - batch - x()) ** 2).sum() / (2 * len(self.readings))
        return loss

    # Every batch holds all the data, so `index` does not matter; `shard` knows which part of it belongs to this process.
    def upper_batch(self, index: int, shard: Shard) -> Sequence[Tensor]:
        return [torch.tensor(part) for part in shard.split(self.references)]

    def lower_batch(self, index: int, shard: Shard) -> Sequence[Tensor]:
        return [torch.tensor(part) for part in shard.split(self.readings)]

    # What is recorded, and plotted, at every step.
    def summary(self, x: Forward) -> dict[str, float]:
        return {"offset": float(x())}
