"""The `deepspeed` backend: ZeRO stages 0 to 3 on the processes of a launcher, with a trainable set that may change."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from bilevel.backend import Placement
from bilevel.blocks import Blocks
from bilevel.errors import InputError
from bilevel.precision import Precision
from bilevel_backends.deepspeed_config import read_config
from bilevel_backends.deferred_init import materialize, meta_copy, move_buffers, require_numbers, weight_source
from bilevel_backends.module_backend import ModuleBackend
from bilevel_backends.processes import Grid, join_processes, own_device, require_groups
from bilevel_backends.sharding.partitioned import Partitioned
from bilevel_backends.sharding.replicated import Replicated
from bilevel_backends.sharding.strategy import ShardingStrategy, copy_shards
from bilevel_backends.sharding.zero3 import Zero3, partition
from bilevel_backends.variable import MESSAGE, ModuleVariable

LIVE = 1_000_000_000
"""DeepSpeed's own value of `stage3_max_live_parameters`."""


@dataclass
class DeepSpeedBackend(ModuleBackend):
    """Several processes, one GPU each (or CPU processes, for a trial), started by torchrun or the deepspeed launcher.

    zero_stage: what is sharded over processes. 0: nothing; 1: masters and moments; 2: gradients too; 3: parameters too.
        It is 3 by default, since several GPUs are mostly used to make two replicas of a large model fit.
    dtype: the precision of the lower variables, as for the torch backend; bfloat16 by default.
    micro_batch_size: samples of one forward and backward pass in each process, on which the result does not depend. "auto":
        as many as fit the GPU by the plan (see `bilevel plan`), and on a CPU the whole share; larger ones need fewer gathers
        and smaller ones less memory. None: the whole share of the batch.
    activation_checkpointing: recompute each repeated block in the backward pass.
    shard_group: the number of processes between which a copy of what the stage shards is split, such as the GPUs of a node:
        parameters are then gathered inside a node alone, and the nodes exchange gradients of what trains. None: all
        processes, which takes least memory.
    sync_each_micro_batch: in stages 2 and 3, sum gradients over processes at every micro-batch, as each process then keeps
        its shard alone. False: once a step, as in stages 0 and 1; every process then holds 4 bytes for each parameter
        that trains, 2 GB for a block of a 32B model.
    offload_optimizer: keep masters, moments and gradients of the active blocks in CPU memory, and update there.
    offload_parameters: keep the sharded parameters in CPU memory (stage 3 only).
    config: a DeepSpeed configuration (a JSON file, or the same as a mapping), merged into ours, for stage 3. Sizes, the
        order of communication, and logging may be set; "auto" is left to this backend; other keys are refused by name.
    timeout: seconds that a process waits for the others before it gives up.
    deterministic: as for the torch backend.

    Every process takes an equal share of each batch; the result is that of one process with the whole batch.
    """

    zero_stage: Literal[0, 1, 2, 3] = 3
    dtype: Precision | None = "bfloat16"
    micro_batch_size: int | Literal["auto"] | None = "auto"
    activation_checkpointing: bool = False
    shard_group: int | None = None
    sync_each_micro_batch: bool = True
    offload_optimizer: bool = False
    offload_parameters: bool = False
    config: str | dict[str, Any] = field(default_factory=dict)
    timeout: float = 1800.0
    deterministic: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError(f"offload_parameters needs zero_stage 3, where parameters are sharded, not {self.zero_stage}")
        if self.timeout <= 0:
            raise ValueError(f"timeout must be positive, not {self.timeout}")
        if read_config(self.config) and self.zero_stage != 3:
            raise ValueError(f"config: a DeepSpeed configuration is used in zero_stage 3 alone, not in {self.zero_stage}")

    def savings(self, rows: int) -> dict[str, Sequence[Any]]:
        """Also: split more, and use the CPU's memory."""
        offload = {"offload_optimizer": [True], "offload_parameters": [True]}
        return {**super().savings(rows), "zero_stage": range(self.zero_stage + 1, 4), **offload}

    def speedups(self, processes: int, node: int) -> dict[str, Sequence[Any]]:
        """Gather inside a node alone; reduce gradients once a step."""
        nodes = {"shard_group": [node]} if self.zero_stage > 0 and node < processes and processes % node == 0 else {}
        return {**nodes, **({"sync_each_micro_batch": [False]} if self.zero_stage >= 2 else {})}

    def start(self, seed: int) -> None:
        """Join the other processes."""
        try:
            import deepspeed
        except ImportError as error:
            raise InputError(
                "the deepspeed backend needs DeepSpeed: pip install 'bilevel[deepspeed]' (or set backend.name=fsdp)"
            ) from error
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # DeepSpeed calls collectives by names that torch has replaced, which users cannot change
        warnings.filterwarnings("ignore", r"`torch\.distributed\..*` is deprecated", FutureWarning)
        device = own_device()
        if device.type == "cpu":
            # DeepSpeed's shared-memory collectives compile C++ at start, under a lock that a killed run leaves behind
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

        def init(backend: str, timeout: Any) -> None:
            os.environ.setdefault("LOCAL_RANK", "0")
            deepspeed.init_distributed(backend, auto_mpi_discovery=False, timeout=timeout, verbose=False)

        self.begin(seed, device, Grid.of(join_processes(device, self.timeout, init), self.shard_group, device))
        if self.deterministic:
            self.be_deterministic()

    def placement(self, world_size: int) -> Placement:
        """What the ZeRO stage shards, and what is offloaded. Starts nothing."""
        require_groups(world_size, self.shard_group)
        zero = (
            {"stage3_max_live_parameters": LIVE, "stage3_prefetch_bucket_size": 1}
            | read_config(self.config).get("zero_optimization", {})
            if self.zero_stage == 3
            else {}
        )
        return Placement(
            "deepspeed",
            world_size,
            shard_group=self.shard_group,
            dtype=self.dtype,
            micro_batch_size=self.micro_batch_size,
            activation_checkpointing=self.activation_checkpointing,
            split_optimizer=self.zero_stage >= 1,
            split_gradients=self.zero_stage >= 2 and self.sync_each_micro_batch,
            split_parameters=self.zero_stage == 3,
            offload_optimizer=self.offload_optimizer,
            offload_parameters=self.offload_parameters,
            live_parameters=int(zero.get("stage3_max_live_parameters", 0)),
            fetched_parameters=int(zero.get("stage3_prefetch_bucket_size", 0)),
            message=MESSAGE,
        )

    def shard_module(self, module: nn.Module, blocks: Blocks, like: ModuleVariable | None) -> ShardingStrategy:
        """Shard what the ZeRO stage shards."""
        if self.zero_stage == 3:
            require_numbers(module, "deepspeed with zero_stage 3")
        on_meta = meta_copy(module)  # while it is a plain module: DeepSpeed's hooks cannot be copied
        shared = like.fixed.names if like is not None else frozenset()
        split = self.zero_stage == 3
        of_replica = like.sharding if like is not None else None
        value = weight_source(module, self._device, self.dtype, of_replica, () if split else shared)
        move_buffers(module, self._device)
        if split:
            sharding: ShardingStrategy = partition(
                module,
                blocks,
                value,
                self._config(module, blocks),
                self._grid,
                self._device,
                reduces_at_step=not self.sync_each_micro_batch,
            )
        else:
            materialize(module, dict(module.named_parameters()), value)
            if self.zero_stage == 0:
                sharding = Replicated(module, self._processes)
            else:
                sharding = Partitioned(
                    module,
                    self._grid,
                    self._device,
                    reduces_at_step=self.zero_stage == 1 or not self.sync_each_micro_batch,
                )
        sharding.meta_module = on_meta
        if like is not None:
            copy_shards(sharding, like.sharding, shared)
            if isinstance(sharding, Zero3):
                sharding.share(shared, like.sharding)
        return sharding

    @property
    def offload(self) -> torch.device | None:
        """The CPU, if `offload_optimizer` is set."""
        return torch.device("cpu") if self.offload_optimizer else None

    def _config(self, module: nn.Module, blocks: Blocks) -> dict[str, Any]:
        """The configuration that DeepSpeed is given.

        Unless it says otherwise, the next block is fetched while one computes: DeepSpeed's own bucket, of 5e7 numbers, is
        a tenth of a block of a 32B model, and what is not in it is fetched when the computation waits for it already.
        """
        given = read_config(self.config)
        sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
        repeated = [sum(sizes.pop(name) for name in blocks.members[path]) for path in blocks.repeated]
        block = max(repeated, default=sum(sizes.values()))
        zero: dict[str, Any] = {
            "stage": 3,
            "stage3_prefetch_bucket_size": block,
            "stage3_max_live_parameters": max(LIVE, block + max(block, *sizes.values(), 0)),
            **given.pop("zero_optimization", {}),
        }
        if self.offload_parameters:
            zero["offload_param"] = {"device": "cpu", "pin_memory": self._device.type == "cuda"}
        return {
            "train_micro_batch_size_per_gpu": 1,  # DeepSpeed asks for a number and uses it in its own reports only
            "gradient_clipping": 0.0,  # 1.0 by default
            **given,
            "zero_optimization": zero,
        }
