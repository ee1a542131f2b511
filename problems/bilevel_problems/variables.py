"""Variables that are plain vectors."""

import torch
from torch import Tensor, nn


class ParameterVector(nn.Module):
    """A vector in float64, or several side by side. A call returns its value as a new tensor."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(start.detach().clone().double())

    def forward(self) -> Tensor:
        """The value, in the shape of the start."""
        return self.value.clone()


class BlockVector(nn.Module):
    """A vector whose coordinates are divided, in order, into equal blocks that can train one at a time."""

    def __init__(self, start: Tensor, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ParameterVector(part) for part in start.chunk(blocks, dim=-1))

    def forward(self) -> Tensor:
        """The whole vector."""
        return torch.cat([block() for block in self.blocks], dim=-1)
