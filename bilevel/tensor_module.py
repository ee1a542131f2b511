"""A variable that is one tensor."""

from torch import Tensor, nn


class TensorModule(nn.Module):
    """A module that holds a tensor, in its parameter `value`. A call returns its value as a new tensor.

    start: the value at the start, which is copied; floating-point, of any shape. A tensor without dimensions is held as one
        of shape (1,), as engines that shard or pack parameters need a dimension; a call returns it without.
    """

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.scalar = not start.dim()
        self.value = nn.Parameter(start.detach().clone().reshape(start.shape or (1,)))

    def forward(self) -> Tensor:
        """The value, in the shape of the start."""
        return self.value.clone().reshape(()) if self.scalar else self.value.clone()
