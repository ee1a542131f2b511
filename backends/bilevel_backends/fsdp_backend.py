"""The `fsdp` backend: torch's FSDP2 (`fully_shard` for every repeated block) on the processes of a launcher.

It uses public torch interfaces only. Parameters are DTensors, sharded along their first dimension; masters, moments and
gradients of the active blocks are sharded in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from bilevel.backend import Placement
from bilevel.blocks import Blocks
from bilevel_backends.deferred_init import materialize, meta_copy, move_buffers, weight_source
from bilevel_backends.module_backend import ModuleBackend
from bilevel_backends.processes import join_processes, own_device
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
    offload_parameters: keep the shards, and with them masters and moments, in CPU memory.
    timeout: seconds that a process waits for the others before it gives up.
    deterministic: as for the torch backend.
    """

    dtype: Literal["float32", "bfloat16", "float64"] | None = "bfloat16"
    micro_batch_size: int | Literal["auto"] | None = "auto"
    activation_checkpointing: bool = False
    offload_parameters: bool = False
    timeout: float = 1800.0
    deterministic: bool = True

    def savings(self, rows: int) -> dict[str, Sequence[Any]]:
        """Also: use the CPU's memory."""
        return {**super().savings(rows), "offload_parameters": [True]}

    def start(self, seed: int) -> None:
        """Join the other processes."""
        device = own_device()
        self.begin(seed, device, join_processes(device, self.timeout))
        self._mesh: DeviceMesh = init_device_mesh(device.type, (self._processes.world_size,))
        if self.deterministic:
            self.be_deterministic()

    def placement(self, world_size: int) -> Placement:
        """Parameters, gradients and optimizer state are sharded, as in ZeRO stage 3. Starts nothing."""
        return Placement(
            "fsdp",
            world_size,
            dtype=self.dtype,
            micro_batch_size=self.micro_batch_size,
            activation_checkpointing=self.activation_checkpointing,
            split_optimizer=True,
            split_gradients=True,
            split_parameters=True,
            offload_optimizer=self.offload_parameters,
            offload_parameters=self.offload_parameters,
            whole_units=True,
        )

    def shard_module(self, module: nn.Module, blocks: Blocks, like: ModuleVariable | None) -> ShardingStrategy:
        """Materialize and shard every repeated block, then the rest."""
        on_meta = meta_copy(module)
        value = weight_source(module, self._device, self.dtype, like.sharding if like is not None else None)
        policy: dict[str, Any] = {
            "mesh": self._mesh,
            "mp_policy": MixedPrecisionPolicy(reduce_dtype=None if self.dtype == "float64" else torch.float32),
            "offload_policy": CPUOffloadPolicy(self._device.type == "cuda") if self.offload_parameters else OffloadPolicy(),
            "reshard_after_forward": True,
        }
        move_buffers(module, self._device)
        outside = dict(module.named_parameters())
        for path in blocks.repeated:  # each is whole only until it is sharded
            inside = [name for name in outside if name.startswith(f"{path}.")]  # those that never train, too
            materialize(module, inside, value)
            fully_shard(module.get_submodule(path), **policy)
            for name in inside:
                del outside[name]
        materialize(module, outside, value)
        fully_shard(module, **policy)
        sharding = FullySharded(module, self._processes)
        sharding.meta_module = on_meta
        if like is not None:
            copy_shards(sharding, like.sharding)
        return sharding
