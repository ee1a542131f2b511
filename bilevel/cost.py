"""What a problem tells a planner: its lower module without values, and the loss of a micro-batch at each level."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from bilevel.blocks import Blocks


@dataclass(frozen=True)
class Cost:
    """How large a problem is. Planning with it needs no weights.

    build: makes the lower module without values (on the meta device), in the precision in which it would be loaded.
    blocks: groups the module's parameters, as `Problem.blocks`.
    loss: (module, rows) -> the lower loss of a micro-batch of that many rows, each as long as a row can be.
    lower_rows, upper_rows: the number of rows in one global batch of each level; 0 if a level has no data.
    row_size: the largest number of units in a row.
    unit: what throughput is counted in.
    upper_loss: the same as `loss` for the upper level; None if both levels have the same loss.
    savings: what would make a pass need less memory at the expense of the results; phrases that name the recipe's key,
        such as "shorter rows (problem.max_length)".
    """

    build: Callable[[], nn.Module]
    blocks: Callable[[nn.Module], Blocks]
    loss: Callable[[nn.Module, int], Tensor]
    lower_rows: int
    upper_rows: int
    row_size: int = 1
    unit: str = "rows"
    upper_loss: Callable[[nn.Module, int], Tensor] | None = None
    savings: tuple[str, ...] = ()
