"""Where the parameters of one module live, as one process sees them."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class Layout(ABC):
    """What this process keeps of each parameter of a module: its part.

    Methods that communicate are called by all processes, for the same parameters in the same order.
    """

    whole: bool = True
    """The part is the parameter, the same in every process."""

    deferred: bool = False
    """Gradients wait for the step, whole, before they are summed over processes; otherwise each is summed as it comes."""

    hooked: bool = True
    """Autograd gives gradients of whole parameters, to be taken by a hook as they come. Otherwise they lie in the
    parameters' `grad` after the backward pass."""

    skeleton: nn.Module | None = None
    """The module as it was, without its weights, for layouts whose module cannot be copied."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.parameters = dict(module.named_parameters())

    @abstractmethod
    def part(self, name: str) -> Tensor:
        """What this process updates of a parameter; shares its memory."""

    @abstractmethod
    def reduce(self, name: str, gradient: Tensor) -> Tensor:
        """This process's part of the sum of everybody's gradient. `gradient` may be overwritten."""

    @abstractmethod
    def cut(self, name: str, whole: Tensor) -> Tensor:
        """This process's part of a tensor that has the parameter's whole shape."""

    @abstractmethod
    def join(self, name: str, part: Tensor, rank: int) -> Tensor | None:
        """The whole tensor of everybody's parts, for one process; None for the others."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole parameter."""

    def publish(self, name: str) -> None:  # noqa: B027 - most layouts need not
        """The part was written: let the other processes' copies follow, where they have any."""

    def settle(self) -> None:  # noqa: B027
        """A pass is over: give back what was gathered for it."""


def copy_parts(target: Layout, source: Layout) -> None:
    """Give `target` the weights of `source`, a layout of the same kind, part by part."""
    with torch.no_grad():
        for name in target.parameters:
            target.part(name).copy_(source.part(name))
            target.publish(name)


class Whole(Layout):
    """One process has everything."""

    def part(self, name: str) -> Tensor:
        """The parameter."""
        return self.parameters[name].detach()

    def reduce(self, name: str, gradient: Tensor) -> Tensor:
        """Nothing to add."""
        return gradient

    def cut(self, name: str, whole: Tensor) -> Tensor:
        """All of it."""
        return whole

    def join(self, name: str, part: Tensor, rank: int) -> Tensor | None:
        """It is whole."""
        return part

    def shape(self, name: str) -> tuple[int, ...]:
        """As it is."""
        return tuple(self.parameters[name].shape)
