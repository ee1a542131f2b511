"""Variables that are plain vectors."""

import torch
from torch import Tensor, nn

from bilevel.tensor_module import TensorModule


class ParameterVector(TensorModule):
    """A vector in float64, or several side by side."""

    def __init__(self, start: Tensor) -> None:
        super().__init__(start.double())


class BlockVector(nn.Module):
    """A vector whose coordinates are divided, in order, into equal blocks that can train one at a time."""

    def __init__(self, start: Tensor, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ParameterVector(part) for part in start.chunk(blocks, dim=-1))

    def forward(self) -> Tensor:
        """The whole vector."""
        return torch.cat([block() for block in self.blocks], dim=-1)
