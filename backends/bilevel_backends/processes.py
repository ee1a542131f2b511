"""The processes of a run and their collectives. One process alone needs no process group."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bilevel.errors import InputError
from bilevel.launch import launched, local_rank

T = TypeVar("T")

# torch 2.13 gave these collectives new names and warns about the old ones
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Processes:
    """This process among all processes of the run. Every method must be called by all of them, in the same order."""

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank = rank
        self.world_size = world_size

    def all_gather_object(self, value: T) -> list[T]:
        """The values of all processes (anything that pickles), by rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over processes, in place; bit for bit the same in each."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def reduce_scatter(self, padded: Tensor) -> Tensor:
        """This process's shard of the sum over processes. Shapes: (world_size * n,) -> (n,)."""
        if self.world_size == 1:
            return padded
        mine = padded.new_empty(padded.numel() // self.world_size)
        _reduce_scatter(mine, padded)
        return mine

    def all_gather(self, shard: Tensor) -> Tensor:
        """The shards of all processes, in order of rank. Shapes: (n,) -> (world_size * n,)."""
        if self.world_size == 1:
            return shard
        gathered = shard.new_empty(self.world_size * shard.numel())
        _all_gather(gathered, shard.contiguous())
        return gathered

    def gather(self, shard: Tensor, rank: int) -> Tensor | None:
        """The same, in the process of that rank only; the others get None and hold nothing."""
        if self.world_size == 1:
            return shard
        shards = [torch.empty_like(shard) for _ in range(self.world_size)] if self.rank == rank else None
        dist.gather(shard.contiguous(), shards, dst=rank)
        return torch.cat(shards) if shards is not None else None


def join_processes(device: torch.device, timeout: float, init: Callable[..., Any] = dist.init_process_group) -> Processes:
    """Join the other processes that the launcher started.

    timeout: seconds after which a process that waits for the others gives up.
    init: the function that initializes the process group.

    Raises `InputError` if no launcher was used.
    """
    if not launched():
        raise InputError(
            "this backend runs under a launcher: `torchrun --nproc-per-node 8 -m bilevel run RECIPE`, or "
            "`deepspeed --no_local_rank --module bilevel run RECIPE`; for one process without one, set backend.name=torch"
        )
    if not dist.is_initialized():
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29500")
        # what is offloaded to the CPU is reduced and gathered there, which NCCL cannot do
        init("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout))
    return Processes(dist.get_rank(), dist.get_world_size())


def own_device() -> torch.device:
    """The GPU of this process among those of its machine, or the CPU where there is none.

    Raises `InputError` if more processes were started than the machine has GPUs.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local = local_rank()
    if local >= torch.cuda.device_count():
        raise InputError(
            f"process {local} of this machine has no GPU: there are {torch.cuda.device_count()}; "
            f"start as many processes as there are GPUs (torchrun --nproc-per-node {torch.cuda.device_count()})"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)
