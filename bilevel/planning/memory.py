"""The bytes of a run: on each GPU, and in the memory of each machine."""

from __future__ import annotations

import torch

from bilevel.backend import Placement
from bilevel.optimizer import SGD, AdamW
from bilevel.planning.footprint import Footprint
from bilevel.planning.hardware import GB, Hardware
from bilevel.planning.load import Load, Setup
from bilevel.solver import Workload

FLOAT32 = 4
ROUNDING = 10  # bytes an element: random bits, the sum and the result of writing a bfloat16 parameter back


def on_gpu(
    model: Footprint, setup: Setup, placement: Placement, hardware: Hardware, passes: list[Load], draw: frozenset[str]
) -> dict[str, int]:
    """Bytes on one GPU while these blocks train, at the worst moment of a step."""
    n, active = placement.shards, model.count(draw)
    masters, moments, gradients = _state_bytes(model, setup.workload, placement, active)
    optimizer_share = 0 if placement.offload_optimizer else _share(placement.split_optimizer, n)
    parameter_share = 0 if placement.offload_parameters else _share(placement.split_parameters, n)
    gradient_share = 0 if _gradients_offloaded(placement) else _share(placement.split_gradients, n)
    parts = {
        "parameters": _held(model, setup.workload) * parameter_share,
        "masters": masters * optimizer_share,
        "moments": moments * optimizer_share,
        "gradients": gradients * gradient_share,
        **_worst_moment(model, placement, passes, draw),
    }
    if setup.workload.marked and not placement.offload_optimizer:
        parts["marked weights"] = _marked(model, setup) * optimizer_share
    held = sum(parts.values())
    reserve = (hardware.context + (hardware.communicator if hardware.gpus > 1 else 0)) * GB + hardware.fragmentation * held
    return {
        part: round(size)
        for part, size in (parts | {"allocator" if hardware.on_cpu else "CUDA, NCCL and allocator": reserve}).items()
    }


def _worst_moment(model: Footprint, placement: Placement, passes: list[Load], draw: frozenset[str]) -> dict[str, float]:
    """What is held beside the states: at the loss, in a block, or when the step writes the parameters back."""
    traced = [load.traced(model, draw, recompute=placement.activation_checkpointing) for load in passes]
    at_loss, in_block = (max(traced, key=lambda p: p.loss_peak), max(traced, key=lambda p: p.block_peak))
    staying, gathered = _gathered(model, placement)
    written = ROUNDING * (model.dtype == torch.bfloat16) + FLOAT32 * placement.offload_optimizer
    written_back = written * model.largest(draw) * _share(placement.split_optimizer, placement.shards)
    moments = [
        (at_loss.kept, at_loss.loss_peak - at_loss.kept, staying),
        (
            in_block.kept,
            in_block.block_peak - in_block.kept + model.unpacked_bytes,
            gathered + _reduced(model, placement, draw),
        ),
        (0, written_back, 0),
    ]
    kept, working, communicated = max(moments, key=sum)
    return {"activations": kept, "output, loss and working memory": working, "communication": communicated}


def on_machine(model: Footprint, setup: Setup, placement: Placement, hardware: Hardware, active: int) -> dict[str, int]:
    """The bytes of a machine's memory, of all its processes together.

    A checkpoint is copied as a whole, each process's part by itself, or else goes through the memory tensor by tensor, as it
    does when it is loaded.
    """
    here, held = min(hardware.gpus, hardware.gpus_per_node), _held(model, setup.workload)
    masters, moments, gradients = _state_bytes(model, setup.workload, placement, active)
    states = masters + moments + (gradients if _gradients_offloaded(placement) else 0)
    marked = _marked(model, setup)
    of_parameters = here * _share(placement.split_parameters, placement.shards)
    of_states = here * _share(placement.split_optimizer, placement.shards)
    copied = (held - model.fixed_bytes + masters + moments + marked) * here / hardware.gpus  # what never trains is not saved
    largest = FLOAT32 * model.largest(frozenset(model.blocks.members))
    parts = {
        "parameters": held * of_parameters if placement.offload_parameters else 0,
        "masters, moments, gradients": (states + marked) * of_states if placement.offload_optimizer else 0,
        "writing a checkpoint": copied if setup.copied else largest,
        "processes": here * hardware.process * GB,
    }
    return {part: round(size) for part, size in parts.items()}


def updated_bytes(model: Footprint, workload: Workload, placement: Placement, active: int) -> int:
    """What an optimizer step of all replicas reads and writes, of all that is split."""
    return 2 * sum(_state_bytes(model, workload, placement, active))


def _state_bytes(model: Footprint, workload: Workload, placement: Placement, active: int) -> tuple[int, int, int]:
    """Masters, moments and gradients (with all other vectors) of all replicas, before they are split."""
    width = FLOAT32 if model.dtype == torch.bfloat16 else model.dtype.itemsize
    count = len(workload.replicas)
    vectors = count if workload.vectors is None else workload.vectors
    moments = sum(_moments(optimizer) for optimizer in workload.replicas.values())
    beside = model.dtype == torch.bfloat16 or placement.offload_optimizer  # else a parameter is its own master
    return (count * active * width if beside else 0, moments * active * width, vectors * active * width)


def _held(model: Footprint, workload: Workload) -> int:
    """Bytes of the parameters of all replicas, which share those that never train, before they are split."""
    return model.fixed_bytes + len(workload.replicas) * (model.bytes - model.fixed_bytes)


def _marked(model: Footprint, setup: Setup) -> int:
    """Bytes of what a solver can rewind: all that trains within the steps between two rewinds, at most."""
    period = setup.workload.marked
    if not period:
        return 0
    windows = range(0, setup.steps, period * max(1, setup.steps // (50 * period)))
    drawn = (frozenset().union(*(setup.active.at(t + k, model.blocks, setup.seed) for k in range(period))) for t in windows)
    return max(model.count(blocks) for blocks in drawn) * model.dtype.itemsize


def _gradients_offloaded(placement: Placement) -> bool:
    """They go where the masters are when they have been summed over processes: at once, if they are split."""
    return placement.offload_optimizer and placement.split_gradients


def _moments(optimizer: SGD | AdamW) -> int:
    return 2 if isinstance(optimizer, AdamW) else int(optimizer.momentum != 0)


def _gathered(model: Footprint, placement: Placement) -> tuple[int, int]:
    """Bytes of whole parameters beside a process's own share: at the loss, and while a block runs.

    In a block, that is the block and the next one, or what stands outside. Units that are gathered whole free what stands
    before the blocks, unless the head shares it, and keep what stands after them.
    """
    if not (placement.split_parameters or placement.offload_parameters):
        return 0, 0
    layout, width = model.layout, model.dtype.itemsize
    repeated, outside = sorted(layout.repeated, reverse=True), [layout.before, layout.after]
    if placement.whole_units:
        staying = layout.after + (layout.before if model.blocks.head_is_embedding or not repeated else 0)
        return width * staying, width * max(sum(repeated[:2]) + staying, sum(repeated[:1]) + layout.before)
    needed = sum(repeated[:1]) + max([*outside, *repeated[1:2]])
    live = max(needed, min(placement.live_parameters, model.parameters))
    buffer = max([placement.fetched_parameters, *repeated[:1]]) if placement.fetched_parameters else 0
    every = width * (live + min(buffer, model.parameters))
    return every, every


def _reduced(model: Footprint, placement: Placement, draw: frozenset[str]) -> int:
    """Bytes of gradients on their way to the other processes, in a backward pass.

    A message has the gradients of a block, in float32. One fills while another is under way, of which this process gets its
    share. Units that are reduced whole also hold autograd's own gradients meanwhile, and leave what is reduced with the
    parameters until the pass is over.
    """
    if placement.processes == 1 or not placement.split_gradients:
        return 0
    width, precise = model.dtype.itemsize, max(FLOAT32, model.dtype.itemsize)
    if placement.whole_units:
        outside = sum(model.sizes[block] for block in draw if block not in model.blocks.repeated)
        blocks = [model.sizes[block] for block in draw if block in model.blocks.repeated]
        return (precise + width) * max([outside, *blocks]) + width * model.count(draw) // placement.shards
    messages = sorted((part for block in draw for part in _messages(model.sizes[block], placement.message)), reverse=True)
    return precise * (sum(messages[:2]) + sum(messages[:1]) // placement.shards)


def _messages(size: int, most: int | None) -> list[int]:
    """The sizes of the messages in which so many gradients travel."""
    return [size] if most is None else [*[most] * (size // most), size % most]


def _share(split: bool, processes: int) -> float:
    return 1 / processes if split else 1.0
