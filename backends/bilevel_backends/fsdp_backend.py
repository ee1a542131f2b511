"""The `fsdp` backend: torch's FSDP2 (`fully_shard` for every repeated block) on the processes of a launcher.

It uses public torch interfaces only. Parameters are DTensors, sharded along their first dimension; masters, moments and
gradients of the active blocks are sharded in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from bilevel.backend import Placement
from bilevel.blocks import Blocks, named_embeddings
from bilevel.errors import InputError
from bilevel.precision import Precision
from bilevel_backends.deferred_init import materialize, meta_copy, move_buffers, require_numbers, weight_source
from bilevel_backends.module_backend import ModuleBackend
from bilevel_backends.processes import Grid, join_processes, own_device, require_groups
from bilevel_backends.sharding.fully_sharded import FullySharded
from bilevel_backends.sharding.strategy import ShardingStrategy, copy_shards
from bilevel_backends.variable import ModuleVariable


@dataclass
class FSDPBackend(ModuleBackend):
    """Several processes, one GPU each (or CPU processes, for a trial), started by torchrun.

    dtype: the precision of the lower variables, as for the torch backend; bfloat16 by default. Gradients are reduced in
        float32.
    micro_batch_size: samples of one forward and backward pass in each process, on which the result does not depend. "auto":
        as many as fit the GPU by the plan (see `bilevel plan`), and on a CPU the whole share; larger ones need fewer gathers
        and smaller ones less memory. None: the whole share of the batch.
    activation_checkpointing: recompute each repeated block in the backward pass.
    shard_group: the number of processes between which a copy of the parameters is split, such as the GPUs of a node:
        parameters are then gathered inside a node alone, and the nodes exchange gradients of what trains (HSDP). None: all
        processes, which takes least memory.
    sync_each_micro_batch: sum gradients over processes at every micro-batch, as each process then keeps its shard alone.
        False: once a pass; during a pass, every process then holds 4 bytes for each parameter that trains, 2 GB for a
        block of a 32B model. That rounds once to bfloat16, in which FSDP hands reduced gradients over.
    offload_parameters: keep the shards, and with them masters and moments, in CPU memory.
    timeout: seconds that a process waits for the others before it gives up.
    deterministic: as for the torch backend.

    A parameter that no row of a batch uses, such as those of an expert, gets a gradient of zero, with which AdamW goes on
    moving it; the other backends leave it where it is. (Before torch 2.13, all processes must use the same parameters.)
    """

    dtype: Precision | None = "bfloat16"
    micro_batch_size: int | Literal["auto"] | None = "auto"
    activation_checkpointing: bool = False
    shard_group: int | None = None
    sync_each_micro_batch: bool = True
    offload_parameters: bool = False
    timeout: float = 1800.0
    deterministic: bool = True

    def savings(self, rows: int) -> dict[str, Sequence[Any]]:
        """Also: use the CPU's memory."""
        return {**super().savings(rows), "offload_parameters": [True]}

    def speedups(self, processes: int, node: int) -> dict[str, Sequence[Any]]:
        """Gather inside a node alone; reduce gradients once a pass."""
        nodes = {"shard_group": [node]} if node < processes and processes % node == 0 else {}
        return {**nodes, "sync_each_micro_batch": [False]}

    def start(self, seed: int) -> None:
        """Join the other processes."""
        device = own_device()
        self.begin(seed, device, Grid.of(join_processes(device, self.timeout), self.shard_group, device))
        if self.deterministic:
            self.be_deterministic()

    def placement(self, world_size: int) -> Placement:
        """Parameters, gradients and optimizer state are sharded, as in ZeRO stage 3. Starts nothing."""
        require_groups(world_size, self.shard_group)
        return Placement(
            "fsdp",
            world_size,
            shard_group=self.shard_group,
            dtype=self.dtype,
            micro_batch_size=self.micro_batch_size,
            activation_checkpointing=self.activation_checkpointing,
            split_optimizer=True,
            split_gradients=self.sync_each_micro_batch,
            split_parameters=True,
            offload_optimizer=self.offload_parameters,
            offload_parameters=self.offload_parameters,
            whole_units=True,
        )

    def shard_module(self, module: nn.Module, blocks: Blocks, like: ModuleVariable | None) -> ShardingStrategy:
        """Materialize and shard every repeated block, then the rest."""
        require_numbers(module, "fsdp")
        scalar = next((name for name, parameter in module.named_parameters() if not parameter.dim()), None)
        if scalar is not None:
            raise InputError(f"the parameter {scalar!r} is a scalar, which FSDP cannot shard; give it the shape (1,)")
        on_meta = meta_copy(module)
        value = weight_source(module, self._device, self.dtype, like.sharding if like is not None else None)
        policy: dict[str, Any] = {
            "mesh": self._grid.mesh,
            "mp_policy": MixedPrecisionPolicy(reduce_dtype=None if self.dtype == "float64" else torch.float32),
            "offload_policy": CPUOffloadPolicy(self._device.type == "cuda") if self.offload_parameters else OffloadPolicy(),
        }
        move_buffers(module, self._device)
        source, head = _embeddings(module, blocks)
        units = [*([source] if source else []), *blocks.repeated, *([head] if head else [])]
        outside = dict(module.named_parameters())
        for path in units:  # each is whole only until it is sharded
            inside = [name for name in outside if name.startswith(f"{path}.")]  # those that never train, too
            materialize(module, inside, value)
            # the backward pass begins with the head, which therefore stays
            fully_shard(module.get_submodule(path), **policy, reshard_after_forward=path != head)
            for name in inside:
                del outside[name]
        materialize(module, outside, value)
        fully_shard(module, **policy, reshard_after_forward=False)
        parts: list[Any] = [module.get_submodule(path) for path in units]
        for part, following in pairwise(parts):  # gathered while the one before computes, however far ahead the CPU is
            part.set_modules_to_forward_prefetch([following])
        if source:  # its gradient does not depend on its weights
            parts[0].set_unshard_in_backward(False)
        whole: Any = module
        if hasattr(whole, "set_reduce_scatter_unused_params"):  # processes may have gradients of different parameters
            whole.set_reduce_scatter_unused_params(True)
        shared = like.fixed.names if like is not None else frozenset()
        if like is not None:  # FSDP looks which parameters there are before its first pass
            materialize(module, shared, lambda name, _: like.parameter(name))
        sharding = FullySharded(module, self._grid, sync_each_micro_batch=self.sync_each_micro_batch)
        sharding.meta_module = on_meta
        if like is not None:
            copy_shards(sharding, like.sharding, shared)
        return sharding


def _embeddings(module: nn.Module, blocks: Blocks) -> tuple[str | None, str | None]:
    """The paths of the input embedding and of the output head, if the module has them and no parameter is in both."""
    paths: dict[nn.Module | None, str] = {part: path for path, part in module.named_modules()}
    source, head = named_embeddings(module)
    if source is None or head is None:
        return None, None
    tied = {id(p) for p in source.parameters()} & {id(p) for p in head.parameters()}
    return (None, None) if tied or blocks.head_is_embedding else (paths.get(source), paths.get(head))
