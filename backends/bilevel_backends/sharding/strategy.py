"""How the parameters of one module are sharded over processes, as one process sees it."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class ShardingStrategy(ABC):
    """What this process keeps of each parameter of a module: its shard.

    Methods that communicate are called by all processes, for the same parameters in the same order.
    """

    whole: bool = True
    """Each shard is the whole parameter, the same in every process."""

    reduces_at_step: bool = False
    """Gradients are accumulated unreduced and whole, and summed over processes at the step. Otherwise each gradient is
    reduced as soon as it arrives."""

    hooked: bool = True
    """Autograd produces gradients of whole parameters, which a hook takes as they arrive. Otherwise they are found in the
    parameters' `grad` after the backward pass."""

    holder: tuple[int, int] = (0, 1)
    """Which of the processes that hold the same shard this one is, and how many they are."""

    meta_module: nn.Module | None = None
    """The module as it was before sharding, on the meta device, for strategies whose module cannot be copied."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.parameters = dict(module.named_parameters())

    @abstractmethod
    def local(self, name: str) -> Tensor:
        """This process's shard of a parameter, which it updates; it shares the parameter's memory."""

    @abstractmethod
    def reduce(self, name: str, gradient: Tensor) -> Tensor:
        """This process's shard of the sum of all processes' gradients. `gradient` may be overwritten."""

    @abstractmethod
    def stretch(self, name: str) -> range:
        """Which numbers of the flattened parameter this process's shard holds. In the shard, padding may follow them."""

    @abstractmethod
    def gather(self, name: str, shard: Tensor, rank: int) -> Tensor | None:
        """The whole tensor, from the shards of all processes, in the process of that rank; None in the others."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the whole parameter."""

    def all_gather(self, name: str) -> None:  # noqa: B027 - most strategies need not
        """Called when the shard was written: update the other processes' copies of it, where they have any."""

    def reshard(self) -> None:  # noqa: B027
        """Called when a pass is over: free what was gathered for it."""


def copy_shards(target: ShardingStrategy, source: ShardingStrategy) -> None:
    """Give `target` the weights of `source`, which is sharded in the same way, shard by shard."""
    with torch.no_grad():
        for name in target.parameters:
            target.local(name).copy_(source.local(name))
            target.all_gather(name)
