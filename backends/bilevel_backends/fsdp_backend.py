"""The `fsdp` backend: torch's FSDP2 (`fully_shard` for every repeated block) on the processes of a launcher.

Only public torch interfaces. Parameters are DTensors, split along their first dimension; masters, moments and gradients
of the active blocks are split the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from bilevel.backend import Placement
from bilevel.blocks import Blocks
from bilevel_backends.layout import Layout, copy_parts
from bilevel_backends.materialise import fill, move_buffers, skeleton, weight_source
from bilevel_backends.module_backend import ModuleBackend
from bilevel_backends.processes import Processes, join_processes, own_device
from bilevel_backends.variable import ModuleVariable


class FullySharded(Layout):
    """A module under `fully_shard`."""

    whole = False
    hooked = False  # gradients are DTensors, which FSDP puts in place when it has reduced them

    def __init__(self, module: nn.Module, processes: Processes) -> None:
        super().__init__(module)
        self.processes = processes

    def part(self, name: str) -> Tensor:
        """The local shard."""
        sharded = self._sharded(name).detach()
        assert isinstance(sharded, DTensor)
        return sharded.to_local()

    def reduce(self, name: str, gradient: Tensor) -> Tensor:
        """FSDP has reduced it, to the mean over processes; ours is the sum."""
        assert isinstance(gradient, DTensor)
        return gradient.to_local() * self.processes.world_size

    def cut(self, name: str, whole: Tensor) -> Tensor:
        """The local shard."""
        p = self._sharded(name)
        where = whole.to(p.device_mesh.device_type)
        return distribute_tensor(where, p.device_mesh, p.placements, src_data_rank=None).to_local()

    def join(self, name: str, part: Tensor, rank: int) -> Tensor | None:
        """Gather the shards."""
        p = self._sharded(name)
        local = part.to(p.device_mesh.device_type)
        whole = DTensor.from_local(local, p.device_mesh, p.placements, shape=p.shape, stride=p.stride()).full_tensor()
        return whole if self.processes.rank == rank else None

    def shape(self, name: str) -> tuple[int, ...]:
        """A DTensor's shape is that of the whole."""
        return tuple(self.parameters[name].shape)

    def settle(self) -> None:
        """Free what is gathered: it would be stale after the next update."""
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _sharded(self, name: str) -> DTensor:
        parameter = self.parameters[name]
        assert isinstance(parameter, DTensor)
        return parameter


@dataclass
class FSDPBackend(ModuleBackend):
    """Several processes, one GPU each (or CPU processes, for a trial), started by torchrun.

    dtype: of the lower variables; as for the torch backend. bfloat16 by default. Gradients are reduced in float32.
    micro_batch_size: samples of one forward and backward in each process. None: its whole share of the batch.
    activation_checkpointing: recompute each repeated block in the backward pass.
    offload_parameters: keep the shards, and with them masters and moments, in CPU memory.
    timeout: seconds that a process waits for the others before it gives up.
    deterministic: as for the torch backend.
    """

    dtype: Literal["float32", "bfloat16", "float64"] | None = "bfloat16"
    micro_batch_size: int | None = None
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
        """Everything split, as in ZeRO stage 3. Starts nothing."""
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

    def lay_out(self, module: nn.Module, blocks: Blocks, like: ModuleVariable | None) -> Layout:
        """Shard every repeated block, then the rest, and fill the shards."""
        blank = skeleton(module)
        value = weight_source(module, self._device, self.dtype, like.layout if like is not None else None)
        policy: dict[str, Any] = {
            "mesh": self._mesh,
            "mp_policy": MixedPrecisionPolicy(reduce_dtype=None if self.dtype == "float64" else torch.float32),
            "offload_policy": CPUOffloadPolicy(self._device.type == "cuda") if self.offload_parameters else OffloadPolicy(),
            "reshard_after_forward": True,
        }
        move_buffers(module, self._device)
        for path in blocks.repeated:  # each is whole only until it is sharded
            fill(module, blocks.members[path], value)
            fully_shard(module.get_submodule(path), **policy)
        in_blocks = {name for path in blocks.repeated for name in blocks.members[path]}
        fill(module, [name for name, _ in module.named_parameters() if name not in in_blocks], value)
        fully_shard(module, **policy)
        layout = FullySharded(module, self._processes)
        layout.skeleton = blank
        if like is not None:
            copy_parts(layout, like.layout)
        return layout
