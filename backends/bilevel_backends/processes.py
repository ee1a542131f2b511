"""The processes of a run and their collectives. One process alone needs no process group."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from contextvars import copy_context
from dataclasses import dataclass
from datetime import timedelta
from threading import Thread
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from bilevel.errors import InputError, RunError
from bilevel.launch import launched, local_rank, local_world_size

T = TypeVar("T")

MEETING = 300.0
"""Seconds in which the processes must have met. A launcher starts them together, so that whoever is not there by then will
not come; later they may have to wait longer for one that reads or writes."""

TURN = 2.0
"""Seconds in which a launcher ends all processes when one has ended, so that no other says again what that has said."""

log = logging.getLogger("bilevel")

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

    timeout: seconds after which a process that waits for the others gives up; for the first time at most `MEETING`.
    init: the function that initializes the process group.

    Raises `InputError` if no launcher was used or the GPUs are of different kinds, `RunError` if the processes do not meet.
    """
    if not launched():
        raise InputError(
            "this backend runs under a launcher: `torchrun --nproc-per-node 8 -m bilevel run RECIPE`, or "
            "`deepspeed --no_local_rank --module bilevel run RECIPE`; for one process without one, set backend.name=torch"
        )
    if not dist.is_initialized():
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29500")

        def meet() -> None:
            # what is offloaded to the CPU is reduced and gathered there, which NCCL cannot do
            init("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout))
            _connect(device)

        _within(min(timeout, MEETING), meet)
    objects = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)) if device.type == "cuda" else None
    processes = Processes(dist.get_rank(), dist.get_world_size(), objects=objects)
    require_one_kind(processes.all_gather_object(_kind(device)))
    return processes


def _connect(device: torch.device) -> None:
    """Carry out a first collective: NCCL connects the GPUs only then."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # every thread has its own
    first = torch.ones((), device=device)
    dist.all_reduce(first)
    first.item()


def _within(seconds: float, meet: Callable[[], None]) -> None:
    """Let the processes meet. Raises `RunError`, with what to look at, if they do not in that time, or cannot.

    NCCL may wait forever. It does so in a thread then, which is left behind: the process is about to end.
    """
    errors: list[Exception] = []

    def work() -> None:
        try:
            meet()
        except Exception as error:
            errors.append(error)

    thread = Thread(target=copy_context().run, args=(work,), daemon=True)
    thread.start()
    thread.join(seconds)
    if errors and not isinstance(errors[0], RuntimeError):  # which is what torch raises
        raise errors[0]
    if errors or thread.is_alive():
        reason = str(errors[0]).partition("\n")[0] if errors else f"they have waited for {seconds:g} s"
        words = (
            f"the {os.environ['WORLD_SIZE']} processes do not meet: {reason}. Look whether all of them were started, by the "
            f"same command on every machine; whether every machine reaches {os.environ['MASTER_ADDR']}, port "
            f"{os.environ['MASTER_PORT']}; and, between GPUs, what NCCL tries (NCCL_DEBUG=INFO): NCCL_SOCKET_IFNAME names "
            "its network device, NCCL_IB_DISABLE=1 leaves InfiniBand out, and NCCL_P2P_DISABLE=1 direct access between GPUs"
        )
        if local_rank() > 0:  # the first process speaks for all, unless it is the one that did not come
            time.sleep(TURN * local_rank())
            log.error(words)
        raise RunError(words) from (errors[0] if errors else None)


def _kind(device: torch.device) -> str:
    """What a device is called, with its memory; all CPUs are alike."""
    if device.type != "cuda":
        return device.type
    return (
        f"{torch.cuda.get_device_name(device)} with {torch.cuda.get_device_properties(device).total_memory / 2**30:.0f} GiB"
    )


def require_one_kind(kinds: Sequence[str]) -> None:
    """Raise `InputError` if the processes have devices of different kinds. kinds: by rank.

    The smallest would decide what fits and the slowest how long all wait, and kernels that differ round differently, where
    whole copies of a model have to stay equal bit for bit.
    """
    for rank, kind in enumerate(kinds):
        if kind != kinds[0]:
            raise InputError(
                f"the GPUs are of different kinds: process 0 has {kinds[0]}, and process {rank} has {kind}; "
                "choose equal ones (CUDA_VISIBLE_DEVICES), and start one process for each"
            )


def own_device() -> torch.device:
    """The GPU of this process among those of its machine, or the CPU where there is none.

    Raises `InputError`, in all processes of the machine, if more were started than it has GPUs.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local, gpus = local_rank(), torch.cuda.device_count()
    started = max(local + 1, local_world_size() or 0)
    if started > gpus:
        raise InputError(
            f"process {gpus} of this machine has no GPU: {started} were started, and there are {gpus} GPUs; "
            f"start as many processes as there are GPUs (torchrun --nproc-per-node {gpus})"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)
