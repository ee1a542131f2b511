"""Compute memory and time of a run from what its parts say about themselves. The assumptions are in `Hardware`."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

from bilevel.backend import Placement
from bilevel.errors import InputError
from bilevel.planning.duration import duration
from bilevel.planning.footprint import Footprint, share
from bilevel.planning.hardware import GB, Hardware
from bilevel.planning.load import Setup, loads
from bilevel.planning.memory import on_gpu, on_machine

FILLED = 0.85
"""Of a GPU's memory, what micro-batches of `auto` size may take by the plan, which is good to 15%."""


@dataclass(frozen=True)
class Plan:
    """The memory and the time that a run takes.

    gpu: part -> bytes on each GPU at the worst moment.
    cpu: part -> bytes of all processes of a machine together.
    active: the largest number of parameters that train at a time.
    flops: the operations of one step, on all GPUs together.
    seconds: activity -> seconds of one step.
    hidden: the seconds of communication that go on behind the computing, which `seconds` does not have.
    rows: the rows of the largest micro-batch.
    units: the number of `unit` in all passes of one step.
    """

    placement: Placement
    hardware: Hardware
    parameters: int
    active: int
    rows: int
    gpu: Mapping[str, int]
    cpu: Mapping[str, int]
    flops: float
    seconds: Mapping[str, float]
    hidden: float
    units: float
    unit: str

    @property
    def gpu_bytes(self) -> int:
        """The total on each GPU."""
        return sum(self.gpu.values())

    @property
    def cpu_bytes(self) -> int:
        """The total on the machine."""
        return sum(self.cpu.values())

    @property
    def fits(self) -> bool:
        """Whether each GPU, and the CPU if its memory was given or it is what computes, has enough memory."""
        limit = self.hardware.cpu_memory
        if self.hardware.on_cpu:
            return self.gpu_bytes + self.cpu_bytes <= self.hardware.gpu_memory * GB
        return self.gpu_bytes <= self.hardware.gpu_memory * GB and (limit is None or self.cpu_bytes <= limit * GB)

    @property
    def step_seconds(self) -> float:
        """The seconds of one step."""
        return sum(self.seconds.values())


def make_plan(model: Footprint, setup: Setup, hardware: Hardware) -> Plan:
    """Plan a run.

    model: the problem's lower module, in the precision of the backend.

    Raises `InputError` for parts that do not fit together.
    """
    placement = setup.backend.placement(hardware.gpus)
    if placement.processes % placement.shards:
        raise InputError(f"{placement.processes} GPUs are not groups of {placement.shards} that shard among themselves")
    if placement.split_parameters and model.unpacked_bytes:
        raise InputError(
            f"the backend {placement.name} splits parameters, which works with numbers only, and the base is quantized; "
            "do not quantize, or use a backend that holds parameters whole (torch, or deepspeed with zero_stage 0 to 2)"
        )
    for level, rows in (("lower", model.cost.lower_rows), ("upper", model.cost.upper_rows)):
        if rows % hardware.gpus:
            raise InputError(f"{level} batches have {rows} rows, which {hardware.gpus} GPUs cannot share equally")
    setup.active.at(0, model.blocks, setup.seed)  # says so if the rule does not fit the module
    if placement.micro_batch_size == "auto" and hardware.on_cpu:
        placement = replace(placement, micro_batch_size=None)  # as a run does there
    if placement.micro_batch_size == "auto":
        return _with_most_rows(model, setup, hardware, placement)
    return _plan(model, setup, hardware, placement)


def _with_most_rows(model: Footprint, setup: Setup, hardware: Hardware, placement: Placement) -> Plan:
    """The plan with the largest micro-batches that fit, or with the smallest ones if none do.

    They are tried by halves of a process's share. Memory grows with the rows, so that few have to be traced.
    """
    most = max(share(rows, hardware.gpus) for rows in (model.cost.lower_rows, model.cost.upper_rows))
    sizes = sorted(most >> k for k in range(most.bit_length()))

    @cache
    def planned(size: int) -> Plan:
        return _plan(model, setup, hardware, replace(placement, micro_batch_size=size))

    too_large = bisect_left(sizes, True, key=lambda size: planned(size).gpu_bytes > FILLED * hardware.gpu_memory * GB)
    return planned(sizes[max(too_large - 1, 0)])


def _plan(model: Footprint, setup: Setup, hardware: Hardware, placement: Placement) -> Plan:
    passes = loads(setup.workload, model.cost, placement)
    draws = setup.active.heaviest(model.blocks, model.sizes)
    gpu = max((on_gpu(model, setup, placement, hardware, passes, d) for d in draws), key=lambda parts: sum(parts.values()))
    active = max(map(model.count, draws))
    time = duration(model, setup, placement, hardware, draws, passes)
    return Plan(
        placement=placement,
        hardware=hardware,
        parameters=model.parameters,
        active=active,
        rows=max(load.rows for load in passes),
        gpu=gpu,
        cpu=on_machine(model, setup, placement, hardware, active),
        flops=hardware.gpus * time.flops,
        seconds=time.seconds,
        hidden=time.hidden,
        units=hardware.gpus * model.cost.row_size * sum(load.times * load.share for load in passes),
        unit=model.cost.unit,
    )
