"""What a problem tells a planner: its lower module on the meta device, and a pass of each of its losses."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from bilevel.blocks import Blocks


@dataclass(frozen=True)
class Cost:
    """The size of a problem. Planning from it reads no weights.

    build: makes the lower module without values (on the meta device), in the precision in which it would be loaded.
    blocks: groups the module's parameters, as `Problem.blocks`.
    loss: (module, rows) -> the lower loss of a micro-batch of that many rows, each as long as a row can be.
    lower_rows, upper_rows: the rows of one global batch of each level; 0 where a level has no data.
    row_size: the largest number of units that a row has.
    unit: the unit in which throughput is counted, in the plural.
    upper_loss: the same as `loss` for the upper level; None where both levels take the same.
    packed: module -> {name: bytes} of those of its parameters that never train and are held in another form than the module
        says. Each is taken to be unpacked when it is used. None: there are none.
    savings: what would reduce the memory of a pass at the expense of the results, as phrases that name the recipe's key:
        "shorter rows (problem.max_length)".
    """

    build: Callable[[], nn.Module]
    blocks: Callable[[nn.Module], Blocks]
    loss: Callable[[nn.Module, int], Tensor]
    lower_rows: int
    upper_rows: int
    row_size: int = 1
    unit: str = "rows"
    upper_loss: Callable[[nn.Module, int], Tensor] | None = None
    packed: Callable[[nn.Module], Mapping[str, float]] | None = None
    savings: tuple[str, ...] = ()
