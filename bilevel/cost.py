"""What a problem tells a planner: its lower module on the meta device, and a forward pass of it."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from bilevel.blocks import Blocks


@dataclass(frozen=True)
class Cost:
    """How large a problem is. Planning from it touches neither weights nor data.

    build: makes the lower module on the meta device, in the precision in which it would be loaded.
    blocks: groups the module's parameters, as `Problem.blocks`.
    loss: (module, rows) -> the loss of a micro-batch of that many rows, at the most a row can take; on the meta device.
    lower_rows, upper_rows: rows of one global batch of each level.
    row_size: the most units a row has.
    unit: what throughput is counted in.
    """

    build: Callable[[], nn.Module]
    blocks: Callable[[nn.Module], Blocks]
    loss: Callable[[nn.Module, int], Tensor]
    lower_rows: int
    upper_rows: int
    row_size: int = 1
    unit: str = "rows"
