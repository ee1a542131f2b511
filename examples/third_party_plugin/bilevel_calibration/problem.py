"""Calibrate a sensor: which offset x makes an estimate from its readings agree with a trusted instrument?"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel import Forward, Problem, Shard


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

    readings: tuple[float, ...] = (1.0, 2.0, 3.0)
    references: tuple[float, ...] = (3.5, 4.5)
    ridge: float = 0.0

    # The values at the start. A loss calls them: x() and y() are new tensors.
    def upper(self) -> Tensor:
        return torch.zeros(())

    def lower(self) -> Tensor:
        return torch.zeros(())

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
