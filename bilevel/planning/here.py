"""The machine at hand, for a plan of a run on it: the memory that is free, and a measured speed.

What a pass calls is written down while it runs without values, and then each operation is called and timed once with tensors
of its shapes. The blocks of a model call the same operations, so this takes as long as one block and the head, not as long
as a pass; no weights are read.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from bilevel.errors import InputError
from bilevel.free_memory import free_memory
from bilevel.planning.footprint import Footprint
from bilevel.planning.hardware import GB, Hardware
from bilevel.planning.load import Setup, loads
from bilevel.tracing import flops_of

ENOUGH = 2.0
"""Seconds of probing, largest products first, after which those left are taken to be as fast as the others."""
LONG = 0.02
"""Seconds from which an operation is timed once: it is not repeated to be measured without what its first call sets up."""
PROCESS = 0.6
"""GB that a process has loaded before a model is, without CUDA; 0.5 to 0.6 were measured with transformers."""


def measure(model: Footprint, setup: Setup) -> Hardware:
    """Probe the device that the run would use: the present GPU, or else the CPU. Takes some seconds.

    Starts the setup's backend, which says whether there is a GPU for it.

    model: not traced before, as what it calls is found out while it is.

    Raises `InputError` where the machine does not say how much memory is free, or a pass cannot be traced.
    """
    setup.backend.start(setup.seed)
    room = setup.backend.room
    on_cpu = room is None
    free = free_memory() if room is None else room
    if free is None:
        raise InputError("this machine does not say how much memory is free; plan with --gpu-memory instead of --here")
    placement = setup.backend.placement(1)
    if placement.micro_batch_size == "auto":
        placement = replace(placement, micro_batch_size=1 if room else None)  # on a CPU, a run takes all rows at a time
    load = max(loads(setup.workload, model.cost, placement), key=lambda load: (load.backward, load.micro_batches))
    draw = setup.active.heaviest(model.blocks, model.sizes)[0]
    calls = _Calls()
    with calls:
        traced = load.traced(model, draw, recompute=placement.activation_checkpointing)
    seconds = calls.seconds(torch.device("cpu" if on_cpu else "cuda"), free)
    machine = Hardware(
        gpu_memory=free / GB,
        peak_tflops=max(traced.flops, 1) / seconds / 1e12,
        mfu=1.0,
        launch=seconds / traced.operations,  # of a pass without matrix products, all that there is
        measured=True,
    )
    if not on_cpu:
        return machine
    return replace(machine, on_cpu=True, context=0.0, process=PROCESS)


@dataclass(frozen=True)
class _Call:
    """An operation with its arguments: tensors as their shapes, strides and types."""

    operation: Any
    leaves: tuple[Any, ...]
    layout: Any

    @property
    def bytes(self) -> int:
        """The bytes of its tensors."""
        return sum(prod(leaf.size) * leaf.dtype.itemsize for leaf in self.leaves if isinstance(leaf, _Shape))

    def seconds(self, device: torch.device) -> float | None:
        """How long it takes; None if it cannot be called there, or not without the values of its tensors."""
        try:
            runs = self._runs(device)
            first = next(runs)
            return first if first > LONG else min(next(runs), next(runs))
        except (RuntimeError, NotImplementedError, IndexError):
            return None

    @torch.no_grad()
    def _runs(self, device: torch.device) -> Iterator[float]:
        """The seconds of each call, without end."""
        leaves = [leaf.made(device) if isinstance(leaf, _Shape) else leaf for leaf in self.leaves]
        args, kwargs = tree_unflatten([device if isinstance(leaf, torch.device) else leaf for leaf in leaves], self.layout)
        while True:
            _wait(device)
            started = time.perf_counter()
            self.operation(*args, **kwargs)
            _wait(device)
            yield time.perf_counter() - started


@dataclass(frozen=True)
class _Shape:
    """A tensor without values."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def made(self, device: torch.device) -> Tensor:
        """One that has some: a half, or zero where numbers may be places in a table."""
        length = 1 + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True)) if all(self.size) else 0
        value = 0.5 if self.dtype.is_floating_point else 0
        return torch.full((length,), value, dtype=self.dtype, device=device).as_strided(self.size, self.stride)


class _Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that are called within it, by their arguments.

    flops: of one call of each.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[_Call] = Counter()
        self.flops: dict[_Call, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves, layout = tree_flatten((args, kwargs or {}))
        shapes = [_Shape(tuple(x.shape), x.stride(), x.dtype) if isinstance(x, Tensor) else x for x in leaves]
        call = _Call(func, tuple(shapes), layout)
        out = func(*args, **(kwargs or {}))
        self.counts[call] += 1
        self.flops[call] = flops_of(func, args, kwargs or {}, out)
        return out

    def seconds(self, device: torch.device, room: int) -> float:
        """The seconds of all calls on a device, none of which may take more than a quarter of the bytes that are free."""
        deadline = time.perf_counter() + ENOUGH
        timed = left = seconds = 0.0
        for call, times in sorted(self.counts.items(), key=lambda item: self.flops[item[0]], reverse=True):
            late = timed and self.flops[call] and time.perf_counter() > deadline
            took = None if late or call.bytes > room / 4 else call.seconds(device)
            if took is None:
                left += times * self.flops[call]
            else:
                timed += times * self.flops[call]
                seconds += times * took
        return seconds * (1 + left / timed) if timed else seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
