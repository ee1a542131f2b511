"""Compute memory and time of a run from what its parts say about themselves. The assumptions are in `Hardware`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

import torch

from bilevel.active import Active
from bilevel.backend import Backend, Placement
from bilevel.blocks import EMBEDDING, Blocks
from bilevel.cost import Cost
from bilevel.errors import InputError
from bilevel.optimizer import SGD, AdamW
from bilevel.planning.footprint import Footprint, share
from bilevel.planning.hardware import GB, Hardware
from bilevel.solver import Workload
from bilevel.tracing import Pass

FLOAT32 = 4
ROUNDING = 10  # bytes an element: random bits, the sum and the result of writing a bfloat16 parameter back


@dataclass(frozen=True)
class Setup:
    """The parts of a run that a plan depends on, apart from the problem and the machine.

    seed, steps: those of the run, which decide the draws of the active rule.
    copied: whether checkpoints are copied, to be written while the next steps are taken.
    """

    backend: Backend
    active: Active
    workload: Workload
    seed: int = 0
    steps: int = 1
    copied: bool = True


@dataclass(frozen=True)
class Plan:
    """The memory and the time that a run takes.

    gpu: part -> bytes on each GPU at the worst moment.
    cpu: part -> bytes of all processes together.
    active: the largest number of parameters that train at a time.
    flops: the operations of one step, on all GPUs together.
    seconds: activity -> seconds of one step.
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
        """Whether each GPU, and the CPU if its memory was given, has enough memory."""
        limit = self.hardware.cpu_memory
        return self.gpu_bytes <= self.hardware.gpu_memory * GB and (limit is None or self.cpu_bytes <= limit * GB)

    @property
    def step_seconds(self) -> float:
        """The seconds of one step, with computing, communicating and offloading one after the other."""
        return sum(self.seconds.values())


def make_plan(model: Footprint, setup: Setup, hardware: Hardware) -> Plan:
    """Plan a run.

    model: the problem's lower module, in the precision of the backend.

    Raises `InputError` for parts that do not fit together.
    """
    placement = setup.backend.placement(hardware.gpus)
    cost = model.cost
    for level, rows in (("lower", cost.lower_rows), ("upper", cost.upper_rows)):
        if rows % hardware.gpus:
            raise InputError(f"{level} batches have {rows} rows, which {hardware.gpus} GPUs cannot share equally")
    loads = _loads(setup.workload, cost, placement)
    setup.active.at(0, model.blocks, setup.seed)  # says so if the rule does not fit the module
    draws = setup.active.heaviest(model.blocks, model.sizes)
    gpu = max((_gpu(model, setup, placement, hardware, loads, draw) for draw in draws), key=lambda g: sum(g.values()))
    active = max(_count(model, draw) for draw in draws)
    flops = hardware.gpus * sum(
        load.times * load.share * _mean_flops(model, setup, draws, load, placement.activation_checkpointing)
        for load in loads
    )
    return Plan(
        placement=placement,
        hardware=hardware,
        parameters=model.parameters,
        active=active,
        rows=max(load.rows for load in loads),
        gpu=gpu,
        cpu=_cpu(model, setup, placement, hardware, active),
        flops=flops,
        seconds=_seconds(model, setup.workload, placement, hardware, active, flops, loads),
        units=hardware.gpus * cost.row_size * sum(load.times * load.share for load in loads),
        unit=cost.unit,
    )


@dataclass(frozen=True)
class _Load:
    """Passes of one kind.

    times: how often they are made in a step.
    share: the rows of a process.
    rows: the rows of the largest micro-batch.
    """

    times: float
    share: int
    rows: int
    upper: bool = False
    backward: bool = True
    second_order: bool = False

    @property
    def micro_batches(self) -> float:
        """The number of micro-batches in a step."""
        return self.times * -(-self.share // self.rows)

    def traced(self, model: Footprint, draw: frozenset[str], *, recompute: bool) -> Pass:
        """One micro-batch, while these blocks train."""
        return model.passing(
            self.rows,
            draw if self.backward else frozenset(),
            recompute=recompute,
            upper=self.upper,
            second_order=self.second_order,
        )


def _loads(workload: Workload, cost: Cost, placement: Placement) -> list[_Load]:
    """The kinds of passes that there are. Raises `InputError` if there is none."""
    found = []
    for upper, of_batch, passes, forwards, products in (
        (False, cost.lower_rows, workload.lower_passes, workload.lower_forwards, workload.products),
        (True, cost.upper_rows, workload.upper_passes, workload.upper_forwards, 0),
    ):
        own = share(of_batch, placement.processes)
        rows = own if placement.micro_batch_size is None else min(own, placement.micro_batch_size)
        kinds = (
            _Load(passes, own, rows, upper),
            _Load(forwards, own, rows, upper, backward=False),
            _Load(products, own, rows, upper, second_order=True),
        )
        found += [load for load in kinds if load.times and load.share]
    if not found:
        raise InputError("a step of this solver makes no pass over this problem's batches, so there is nothing to plan")
    return found


def _gpu(
    model: Footprint, setup: Setup, placement: Placement, hardware: Hardware, loads: list[_Load], draw: frozenset[str]
) -> dict[str, int]:
    """Bytes on one GPU while these blocks train, at the worst moment of a step."""
    n, replicas, active = hardware.gpus, setup.workload.replicas, _count(model, draw)
    passes = (load.traced(model, draw, recompute=placement.activation_checkpointing) for load in loads)
    traced = max(passes, key=lambda made: made.peak)
    masters, moments, gradients = _state_bytes(model, setup.workload, placement, active)
    optimizer_share = 0 if placement.offload_optimizer else _share(placement.split_optimizer, n)
    parameter_share = 0 if placement.offload_parameters else _share(placement.split_parameters, n)
    gradient_share = 0 if _gradients_offloaded(placement) else _share(placement.split_gradients, n)
    written = ROUNDING * (model.dtype == torch.bfloat16) + FLOAT32 * placement.offload_optimizer
    written_back = written * model.largest(draw) * _share(placement.split_optimizer, n)
    parts = {
        "parameters": len(replicas) * model.bytes * parameter_share,
        "masters": masters * optimizer_share,
        "moments": moments * optimizer_share,
        "gradients": gradients * gradient_share,
        "activations": traced.kept,
        "output, loss and working memory": max(traced.peak, written_back) - traced.kept,
        "communication": _gathered(model, placement) + _reduced(model, placement, draw),
    }
    if setup.workload.marked and not placement.offload_optimizer:
        parts["marked weights"] = _marked(model, setup) * optimizer_share
    held = sum(parts.values())
    reserve = (hardware.context + (hardware.communicator if n > 1 else 0)) * GB + hardware.fragmentation * held
    return {part: round(size) for part, size in (parts | {"CUDA, NCCL and allocator": reserve}).items()}


def _state_bytes(model: Footprint, workload: Workload, placement: Placement, active: int) -> tuple[int, int, int]:
    """Masters, moments and gradients (with all other vectors) of all replicas, over all processes."""
    width = FLOAT32 if model.dtype == torch.bfloat16 else model.dtype.itemsize
    count = len(workload.replicas)
    vectors = count if workload.vectors is None else workload.vectors
    moments = sum(_moments(optimizer) for optimizer in workload.replicas.values())
    beside = model.dtype == torch.bfloat16 or placement.offload_optimizer  # else a parameter is its own master
    return (count * active * width if beside else 0, moments * active * width, vectors * active * width)


def _marked(model: Footprint, setup: Setup) -> int:
    """Bytes of what a solver can rewind: all that trains within the steps between two rewinds, at most."""
    period = setup.workload.marked
    if not period:
        return 0
    windows = range(0, setup.steps, period * max(1, setup.steps // (50 * period)))
    drawn = (frozenset().union(*(setup.active.at(t + k, model.blocks, setup.seed) for k in range(period))) for t in windows)
    return max(_count(model, blocks) for blocks in drawn) * model.dtype.itemsize


def _gradients_offloaded(placement: Placement) -> bool:
    """They go where the masters are when they have been summed over processes: at once, if they are split."""
    return placement.offload_optimizer and placement.split_gradients


def _moments(optimizer: SGD | AdamW) -> int:
    return 2 if isinstance(optimizer, AdamW) else int(optimizer.momentum != 0)


def _gathered(model: Footprint, placement: Placement) -> int:
    """Whole parameters beside a process's own share: a repeated block, and the next one or what stands outside."""
    if not (placement.split_parameters or placement.offload_parameters):
        return 0
    repeated = sorted((model.sizes[block] for block in model.blocks.repeated), reverse=True)
    outside = [size for block, size in model.sizes.items() if block not in model.blocks.repeated]
    if placement.whole_units:
        needed = sum(repeated[:2]) + sum(outside)
    else:
        needed = sum(repeated[:1]) + max([*outside, *repeated[1:2]], default=0)
    live = max(needed, min(placement.live_parameters, model.parameters))
    buffer = max([placement.fetched_parameters, *repeated[:1]]) if placement.fetched_parameters else 0
    return (live + min(buffer, model.parameters)) * model.dtype.itemsize


def _reduced(model: Footprint, placement: Placement, draw: frozenset[str]) -> int:
    """Gradients on their way to the other processes: a parameter's in float32; or those of a block, in float32 beside
    autograd's own, and the reduced ones of a pass, which lie with the parameters until it is over."""
    if placement.processes == 1:
        return 0
    if not placement.whole_units:
        return FLOAT32 * model.largest(draw)
    outside = sum(model.sizes[block] for block in draw if block not in model.blocks.repeated)
    blocks = [model.sizes[block] for block in draw if block in model.blocks.repeated]
    width = model.dtype.itemsize
    return (FLOAT32 + width) * max([outside, *blocks]) + width * _count(model, draw) // placement.processes


def _cpu(model: Footprint, setup: Setup, placement: Placement, hardware: Hardware, active: int) -> dict[str, int]:
    """The bytes of the machine's memory, of all processes together.

    A checkpoint is copied as a whole, or else goes through the memory tensor by tensor, as it does when it is loaded.
    """
    n, replicas = hardware.gpus, len(setup.workload.replicas)
    masters, moments, gradients = _state_bytes(model, setup.workload, placement, active)
    states = masters + moments + (gradients if _gradients_offloaded(placement) else 0)
    in_parameters = replicas * model.bytes * (1 if placement.split_parameters else n)
    in_states = states * (1 if placement.split_optimizer else n)
    kept = _marked(model, setup)
    marked = kept * (1 if placement.split_optimizer else n) if placement.offload_optimizer else 0
    largest = FLOAT32 * model.largest(frozenset(model.blocks.members))
    return {
        "parameters": in_parameters if placement.offload_parameters else 0,
        "masters, moments, gradients": in_states + marked if placement.offload_optimizer else 0,
        "writing a checkpoint": replicas * model.bytes + masters + moments + kept if setup.copied else largest,
        "processes": round(n * hardware.process * GB),
    }


def _seconds(
    model: Footprint,
    workload: Workload,
    placement: Placement,
    hardware: Hardware,
    active: int,
    flops: float,
    loads: list[_Load],
) -> dict[str, float]:
    """The seconds of one step. Nothing is taken to overlap, which is the slowest case."""
    n, replicas = hardware.gpus, len(workload.replicas)
    micro_batches = sum(load.micro_batches for load in loads if load.backward)
    gathers = sum(load.micro_batches * (2 if load.backward else 1) for load in loads)  # forward, and for the backward pass
    others = (n - 1) / n  # of what is gathered or reduced, the part that comes from elsewhere
    sent = 0.0
    if placement.split_parameters:
        sent += gathers * model.bytes * others
    if placement.split_gradients:
        sent += micro_batches * FLOAT32 * active * others
    else:
        sent += replicas * 2 * FLOAT32 * active * others  # an all-reduce before the step
    if placement.split_optimizer and not placement.split_parameters:
        sent += replicas * active * model.dtype.itemsize * others  # the updated parameters
    own = _share(placement.split_parameters, n)
    moved = gathers * model.bytes * own if placement.offload_parameters else 0.0
    updated = 0.0
    if placement.offload_optimizer:
        held = active * _share(placement.split_optimizer, n)
        masters, moments, gradients = _state_bytes(model, workload, placement, active)
        sums = micro_batches if placement.split_gradients else replicas
        moved += held * FLOAT32 * (sums + replicas)  # gradients down as they are summed, masters up
        updated = 2 * (masters + moments + gradients) * (1 if placement.split_optimizer else n)  # read and written
    return {
        "computing": flops / n / (hardware.peak_tflops * 1e12 * hardware.mfu),
        "communicating": sent / (hardware.link * GB) if n > 1 else 0.0,
        "offloading": moved / (hardware.host_link * GB) + updated / (hardware.host_optimizer * GB),
    }


def _mean_flops(model: Footprint, setup: Setup, heaviest: list[frozenset[str]], load: _Load, recompute: bool) -> float:
    """The FLOPs of a row, averaged over the draws of the run.

    The backward pass ends at the lowest active block, so its cost falls as that block rises: as a straight line for equal
    blocks, which is drawn between the deepest of the heaviest draws and the shallowest draw of the run.
    """

    def flops(draw: frozenset[str]) -> float:
        return load.traced(model, draw, recompute=recompute).flops / load.rows

    every = max(1, setup.steps // 1000)
    drawn = [setup.active.at(t, model.blocks, setup.seed) for t in range(0, setup.steps, every)]
    depths = {draw: _lowest(draw, model.blocks) for draw in [*heaviest, *drawn]}
    deep, shallow = min(heaviest, key=lambda d: depths[d]), max(drawn, key=lambda d: depths[d])
    if depths[deep] == depths[shallow]:
        return flops(deep)
    part = (fmean(depths[draw] for draw in drawn) - depths[deep]) / (depths[shallow] - depths[deep])
    return flops(deep) + part * (flops(shallow) - flops(deep))


def _lowest(draw: frozenset[str], blocks: Blocks) -> int:
    """Position of the lowest active block; what stands outside the repeated blocks is above them, unless it embeds."""
    if EMBEDDING in draw:
        return 0
    return min((i for i, block in enumerate(blocks.repeated) if block in draw), default=len(blocks.repeated))


def _count(model: Footprint, draw: frozenset[str]) -> int:
    return sum(model.sizes[block] for block in draw)


def _share(split: bool, processes: int) -> float:
    return 1 / processes if split else 1.0
