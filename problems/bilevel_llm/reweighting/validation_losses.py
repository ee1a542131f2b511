"""How every validation set fared, where there are several."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from bilevel.record import Record


@dataclass(frozen=True)
class TargetLoss:
    """The loss of one validation set, in nats a token.

    weight: its part of the upper loss; the parts of all sets sum to 1.
    first, last: mean over the first and the last quarter of the steps in which it was measured; None if it never was.
    """

    weight: float
    first: float | None
    last: float | None


def target_losses(history: Sequence[Record], weights: Mapping[str, float]) -> dict[str, TargetLoss]:
    """The losses of y on every set, from the steps' `upper_parts`.

    weights: part of every set in the upper loss.
    """
    names = list(weights)
    numbers = [[record.parts["upper_parts"][name] for name in names] for record in history if "upper_parts" in record.parts]
    if not numbers:
        return {name: TargetLoss(weight, None, None) for name, weight in weights.items()}
    measured, quarter = np.array(numbers), -(-len(numbers) // 4)
    return {
        name: TargetLoss(weights[name], float(measured[:quarter, i].mean()), float(measured[-quarter:, i].mean()))
        for i, name in enumerate(names)
    }


def target_table(losses: Mapping[str, TargetLoss]) -> Table:
    """The same as a table."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("target")
    for column in ("weight", "loss at first", "at last", "change"):
        table.add_column(column, justify="right")
    for name, target in losses.items():
        numbers = ["", "", ""]
        if target.first is not None and target.last is not None:
            numbers = [f"{target.first:.3f}", f"{target.last:.3f}", f"{target.last - target.first:+.3f}"]
        table.add_row(name, f"{target.weight:.3f}", *numbers)
    return table
