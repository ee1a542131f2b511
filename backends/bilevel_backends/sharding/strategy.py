"""How the parameters of one module are sharded over processes, as one process sees it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from bilevel_backends.processes import Processes
from bilevel_backends.sharding.bucket import Bucket


class ShardingStrategy(ABC):
    """What this process keeps of each parameter of a module: its shard.

    Methods that communicate are called by all processes, for the same parameters in the same order.
    """

    whole: bool = False
    """Each shard is the whole parameter, the same in every process."""

    shards: Processes = Processes()
    """The processes between which each parameter is split: this one alone where each shard is whole."""

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
    def stretch(self, name: str) -> range:
        """Which numbers of the flattened parameter this process's shard holds. In the shard, padding may follow them."""

    @abstractmethod
    def gather(self, name: str, shard: Tensor, rank: int) -> Tensor | None:
        """The whole tensor, from the shards of all processes, in the process of that rank among all; None in the others."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the whole parameter."""

    def arrived(self, gradient: Tensor) -> Tensor:
        """This process's shard of a gradient, which arrived summed over processes. It may be taken over."""
        return gradient

    def begin_pass(self, *, last: bool) -> None:  # noqa: B027 - most strategies need not
        """Called before each micro-batch of a backward pass. last: it is the last one, after which gradients are taken."""

    def all_gather(self, names: Sequence[str]) -> None:  # noqa: B027
        """Called when shards were written: update the other processes' copies of them, where they have any."""

    def reshard(self) -> None:  # noqa: B027
        """Called when a pass is over: free what was gathered for it."""


class SummingStrategy(ShardingStrategy):
    """Autograd gives gradients of this process's rows alone, to be summed over processes in messages."""

    reduces_at_step: bool = False
    """Gradients are accumulated whole, and summed over processes at the step. Otherwise they are summed as soon as a block
    has all of its own."""

    @abstractmethod
    def bucket(self, names: Sequence[str], dtype: torch.dtype) -> Bucket:
        """An empty message for the gradients of these parameters."""

    @abstractmethod
    def start_sum(self, bucket: Bucket) -> Callable[[], Tensor]:
        """Begin to sum a message over processes; returns what waits for this process's row of the sum."""


def copy_shards(target: ShardingStrategy, source: ShardingStrategy, shared: Collection[str] = ()) -> None:
    """Give `target` the weights of `source`, which is sharded in the same way, shard by shard.

    shared: parameters of which both have the same shards.
    """
    with torch.no_grad():
        for name in target.parameters:
            if name not in shared:
                target.local(name).copy_(source.local(name))
                target.all_gather([name])
