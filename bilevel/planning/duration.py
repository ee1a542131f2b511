"""The seconds of a step: what GPUs compute, what of their communication the computing cannot hide, and what the CPU adds.

The model of a pass over one micro-batch:

- Split parameters are gathered block by block; while one block computes, the next one is gathered. Only what comes before
  the first block, and that block, are gathered while nothing computes.
- The backward pass ends at the lowest active block, and nothing below it is gathered for it. With activation checkpointing,
  a block's recomputation and its backward pass share one gather. A pass without gradients gathers every block once.
- Split gradients are reduced a block at a time, beside the backward pass and on the same links as its gathers. Nothing is
  left to compute beside the last of these reductions.
- The CPU starts every operation and every gather. It runs ahead of the GPU, so a pass takes as long as the slower of the
  two.

Within a pass, the ratio of computing to communicating is nearly the same in all blocks, so sums over blocks are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

from bilevel.backend import Placement
from bilevel.blocks import EMBEDDING, Blocks
from bilevel.planning.footprint import Footprint
from bilevel.planning.hardware import GB, Hardware
from bilevel.planning.load import Load, Setup
from bilevel.planning.memory import FLOAT32, updated_bytes
from bilevel.solver import Workload


@dataclass(frozen=True)
class Duration:
    """The time and the work of one step.

    seconds: activity -> seconds; they add up to the step. Communication that the computing hides is not in them.
    hidden: the seconds of that communication.
    flops: the operations of one process.
    """

    seconds: dict[str, float]
    hidden: float
    flops: float


def duration(
    model: Footprint,
    setup: Setup,
    placement: Placement,
    hardware: Hardware,
    heaviest: list[frozenset[str]],
    passes: list[Load],
) -> Duration:
    """Add up one step.

    heaviest: the heaviest draws of the active rule.
    passes: the kinds of passes that a step makes.
    """
    draws, links = _Draws(model, setup, heaviest), _Links(placement, hardware)
    active = max(map(model.count, heaviest))
    computing = starting = hidden = flops = fetched = 0.0
    communicating = _at_step(model, setup.workload, placement, links, active)
    for load in passes:
        one = _micro_batch(model, placement, hardware, links, draws, load, active)
        computing += load.micro_batches * one.computing
        communicating += load.micro_batches * (one.on_gpu - one.computing)
        hidden += load.micro_batches * (one.communicating + one.computing - one.on_gpu)
        starting += load.micro_batches * max(0.0, one.starting - one.on_gpu)
        fetched += load.micro_batches * one.gathered
        flops += load.micro_batches * one.flops
    seconds = {
        "computing": computing,
        "communicating": communicating,
        "starting kernels": starting,
        "offloading": _offloading(model, setup.workload, placement, hardware, active, passes, fetched),
    }
    return Duration(seconds, hidden, flops)


@dataclass(frozen=True)
class _MicroBatch:
    """One micro-batch of mean size, averaged over the draws of the run. Times are in seconds.

    flops: the operations.
    gathered: the bytes that are gathered.
    forward, backward: computing.
    first: gathering before anything computes.
    gather_forward, gather_backward: all gathers, with the first.
    reduce, last: all reductions, and the last of them.
    starting: the CPU's time.
    """

    flops: float
    gathered: float
    forward: float
    backward: float
    first: float
    gather_forward: float
    gather_backward: float
    reduce: float
    last: float
    starting: float

    @property
    def computing(self) -> float:
        return self.forward + self.backward

    @property
    def communicating(self) -> float:
        return self.gather_forward + self.gather_backward + self.reduce

    @property
    def on_gpu(self) -> float:
        """The forward pass, then the backward pass; in each, computing and communicating go on side by side."""
        forward = self.first + max(self.forward, self.gather_forward - self.first)
        return forward + max(self.backward, self.gather_backward + self.reduce - self.last) + self.last


def _micro_batch(
    model: Footprint,
    placement: Placement,
    hardware: Hardware,
    links: _Links,
    draws: _Draws,
    load: Load,
    active: int,
) -> _MicroBatch:
    traced = {d: load.traced(model, d, recompute=placement.activation_checkpointing) for d in (draws.deep, draws.shallow)}
    layout, width = model.layout, model.dtype.itemsize
    fill = load.share / load.rows / -(-load.share // load.rows)  # the last micro-batch may be smaller
    forward = fill * draws.mean(lambda d: traced[d].forward_flops)
    backward = fill * draws.mean(lambda d: traced[d].flops - traced[d].forward_flops)

    def again(draw: frozenset[str]) -> tuple[int, int]:
        """The parameters that are gathered for the backward pass, in how many gathers."""
        above = layout.repeated[lowest(draw, model.blocks) :]
        after = 0 if placement.whole_units else layout.after
        return sum(above) + after, len(above) + (after > 0)

    gathered_forward = gathered_backward = first = gathers = 0.0
    if (placement.split_parameters and placement.shards > 1) or placement.offload_parameters:
        gathered_forward = width * sum([layout.before, *layout.repeated, layout.after])
        first = width * sum([layout.before, *layout.repeated[:1]])
        gathers = len(layout.repeated) + (layout.before > 0) + (layout.after > 0)
        if load.backward:
            gathered_backward = width * draws.mean(lambda d: again(d)[0])
            gathers += draws.mean(lambda d: again(d)[1])
    reduced = max(FLOAT32, width) * active if placement.split_gradients and load.backward else 0
    reduce = links.reduce(reduced, split=True)
    speed = hardware.peak_tflops * 1e12 * hardware.mfu
    return _MicroBatch(
        flops=forward + backward,
        gathered=gathered_forward + gathered_backward,
        forward=forward / speed,
        backward=backward / speed,
        first=links.gather(first),
        gather_forward=links.gather(gathered_forward),
        gather_backward=links.gather(gathered_backward),
        reduce=reduce,
        last=reduce / max(len(draws.deep), 1),
        starting=draws.mean(lambda d: traced[d].operations) * hardware.launch + gathers * hardware.gather_launch,
    )


def _at_step(model: Footprint, workload: Workload, placement: Placement, links: _Links, active: int) -> float:
    """What all replicas exchange at their steps: gradients that were not reduced before, and updated parameters."""
    seconds = 0.0
    if not placement.split_gradients:
        seconds += links.reduce(max(FLOAT32, model.dtype.itemsize) * active, split=placement.split_optimizer)
    if placement.split_optimizer and not placement.split_parameters:
        seconds += links.gather(active * model.dtype.itemsize)
    return len(workload.replicas) * seconds


def _offloading(
    model: Footprint,
    workload: Workload,
    placement: Placement,
    hardware: Hardware,
    active: int,
    passes: list[Load],
    gathered: float,
) -> float:
    """What goes over the bus to the CPU, and what the CPU does at the step. Nothing is taken to hide it."""
    moved = gathered / placement.shards if placement.offload_parameters else 0.0
    updated = 0.0
    if placement.offload_optimizer:
        on_node = min(hardware.gpus, hardware.gpus_per_node)
        of_states = 1 / placement.shards if placement.split_optimizer else 1.0
        reduced = sum(load.micro_batches for load in passes if load.backward)
        sums = reduced if placement.split_gradients else len(workload.replicas)
        moved += active * of_states * FLOAT32 * (sums + len(workload.replicas))  # gradients as they are summed, masters back
        updated = on_node * of_states * updated_bytes(model, workload, placement, active)
    return moved / (hardware.host_link * GB) + updated / (hardware.host_optimizer * GB)


class _Links:
    """How long collectives take. `link` and `node_link` of the hardware are bus bandwidths, as nccl-tests define them.

    Processes of consecutive ranks share a machine, so a group that is no larger than a machine communicates inside it.
    """

    def __init__(self, placement: Placement, hardware: Hardware) -> None:
        self.shards, self.processes = placement.shards, placement.processes
        self.copying = hardware.memory_bandwidth * GB
        node = hardware.gpus_per_node
        self.group_speed = (hardware.link if self.shards <= node else hardware.node_link) * GB
        self.speed = (hardware.link if self.processes <= node else hardware.node_link) * GB

    def gather(self, size: float) -> float:
        """Seconds to gather this many bytes from the processes of a group, and to copy them to where they are used."""
        return 0.0 if self.shards == 1 else self._one_way(size) + 2 * size / self.copying

    def reduce(self, size: float, *, split: bool) -> float:
        """Seconds to sum this many bytes over all processes.

        split: each process of a group keeps a part of the sum. Groups then exchange these parts alone.
        """
        if not split:
            return 2 * size * (self.processes - 1) / self.processes / self.speed
        groups = self.processes // self.shards
        return self._one_way(size) + 2 * size / self.shards * (groups - 1) / groups / self.speed

    def _one_way(self, size: float) -> float:
        return size * (self.shards - 1) / self.shards / self.group_speed


class _Draws:
    """The draws of the run's active rule, for means over them.

    What a pass takes falls as its lowest active block rises: as a straight line for equal blocks, which is drawn between
    the deepest of the heaviest draws and the shallowest draw of the run.
    """

    def __init__(self, model: Footprint, setup: Setup, heaviest: list[frozenset[str]]) -> None:
        every = max(1, setup.steps // 1000)
        drawn = [setup.active.at(t, model.blocks, setup.seed) for t in range(0, setup.steps, every)]
        depths = {draw: lowest(draw, model.blocks) for draw in [*heaviest, *drawn]}
        self.deep, self.shallow = min(heaviest, key=lambda d: depths[d]), max(drawn, key=lambda d: depths[d])
        range_ = depths[self.shallow] - depths[self.deep]
        self._part = (fmean(depths[draw] for draw in drawn) - depths[self.deep]) / range_ if range_ else 0.0

    def mean(self, value: Callable[[frozenset[str]], float]) -> float:
        """The mean of a value of the draws."""
        deep = value(self.deep)
        return deep + self._part * (value(self.shallow) - deep) if self._part else deep


def lowest(draw: frozenset[str], blocks: Blocks) -> int:
    """Position of the lowest active block; what stands outside the repeated blocks is above them, unless it embeds."""
    if EMBEDDING in draw:
        return 0
    return min((i for i, block in enumerate(blocks.repeated) if block in draw), default=len(blocks.repeated))
