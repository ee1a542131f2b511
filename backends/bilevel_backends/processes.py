"""The processes of a run and their collectives. One process alone needs no process group."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from bilevel.errors import InputError
from bilevel.launch import launched, local_rank

T = TypeVar("T")

# torch 2.13 gave these collectives new names and warns about the old ones
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Processes:
    """This process among some or all processes of the run. Every method must be called by all of them, in the same order.

    group: what torch calls them; None: all processes.
    objects: the group in which anything that pickles is exchanged. On GPUs it is one of the CPU (gloo): NCCL would have
        to send it from the GPU, and the process would wait until that has computed whatever it was told to.
    """

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        group: dist.ProcessGroup | None = None,
        objects: dist.ProcessGroup | None = None,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.group = group
        self.objects = objects

    def all_gather_object(self, value: T) -> list[T]:
        """The values of all processes (anything that pickles), by rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, self.objects or self.group)
        return values

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over processes, in place; bit for bit the same in each."""
        if self.world_size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def reduce_scatter(self, rows: Tensor, mine: Tensor) -> Tensor:
        """This process's row of the sum over processes, in `mine`. Shapes: (world_size, n), (n,) -> (n,)."""
        if self.world_size == 1:
            return mine.copy_(rows[0])
        _reduce_scatter(mine, rows.view(-1), group=self.group)
        return mine

    def all_gather(self, shard: Tensor) -> Tensor:
        """The shards of all processes, by rank. Shapes: (n,) -> (world_size, n)."""
        if self.world_size == 1:
            return shard[None]
        gathered = shard.new_empty(self.world_size, shard.numel())
        _all_gather(gathered.view(-1), shard.contiguous(), group=self.group)
        return gathered

    def gather(self, shard: Tensor, rank: int) -> Tensor | None:
        """The shards one after the other, in the process of that rank only; the others get None and hold nothing."""
        if self.world_size == 1:
            return shard
        shards = [torch.empty_like(shard) for _ in range(self.world_size)] if self.rank == rank else None
        dist.gather(shard.contiguous(), shards, group=self.group, group_dst=rank)
        return torch.cat(shards) if shards is not None else None


@dataclass(frozen=True)
class Grid:
    """All processes, in groups that hold one copy of the sharded variables each.

    everyone: all processes.
    shards: the group of this process, between which that copy is split.
    replicas: the processes of all groups that hold the same shards as this one.
    mesh: what torch knows of them: (replicas, shards), or (shards,) where there is one group.
    """

    everyone: Processes
    shards: Processes
    replicas: Processes
    mesh: DeviceMesh | None = None

    @staticmethod
    def alone() -> Grid:
        """One process."""
        return Grid(Processes(), Processes(), Processes())

    @staticmethod
    def of(everyone: Processes, shard_group: int | None, device: torch.device) -> Grid:
        """Groups of so many processes with consecutive ranks, as those of a node have; None: one group of all.

        Raises `InputError` if the processes do not fill such groups.
        """
        size = shard_group or everyone.world_size
        require_groups(everyone.world_size, shard_group)
        if size == everyone.world_size:
            mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("shards",))
            return Grid(everyone, everyone, Processes(), mesh)
        copies = everyone.world_size // size
        mesh = init_device_mesh(device.type, (copies, size), mesh_dim_names=("replicas", "shards"))
        shards = Processes(everyone.rank % size, size, mesh.get_group("shards"))
        return Grid(everyone, shards, Processes(everyone.rank // size, copies, mesh.get_group("replicas")), mesh)


def require_groups(world_size: int, shard_group: int | None) -> None:
    """Raise `InputError` if so many processes cannot be divided into groups of that size."""
    if shard_group is not None and world_size % shard_group:
        raise InputError(
            f"{world_size} processes cannot be divided into groups of {shard_group} (backend.shard_group); choose a divisor "
            "of their number, such as the number of GPUs of a node"
        )


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
    objects = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)) if device.type == "cuda" else None
    return Processes(dist.get_rank(), dist.get_world_size(), objects=objects)


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
