"""ZeRO stage 3 by DeepSpeed: it shards the parameters over processes and gathers each block while it is used.

DeepSpeed is given no optimizer: then it partitions parameters and nothing else, and what trains can change at any step.
Masters, moments and the reduction of gradients are ours (`ModuleVariable`). Used beside the public API: a parameter's
`ds_tensor` (the flat shard that this process keeps, padded to equal sizes) and the coordinator's trace, which is a
cache of the order in which blocks are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bilevel.blocks import Blocks
from bilevel_backends.deferred_init import materialize
from bilevel_backends.processes import Grid
from bilevel_backends.sharding.flat_sharding import FlatSharding
from bilevel_backends.sharding.strategy import ShardingStrategy


class Zero3(FlatSharding):
    """A module whose parameters DeepSpeed has partitioned.

    The module is called, not the engine around it, which would expect to run the backward pass too.
    """

    def __init__(
        self,
        module: nn.Module,
        engine: Any,
        shapes: Mapping[str, tuple[int, ...]],
        grid: Grid,
        device: torch.device,
        *,
        reduces_at_step: bool,
    ) -> None:
        super().__init__(module, grid, device, reduces_at_step=reduces_at_step)
        self.engine = engine
        self._shapes = shapes

    def local(self, name: str) -> Tensor:
        """The flat shard that this process keeps."""
        shard: Tensor = self.parameters[name].ds_tensor  # type: ignore[attr-defined]
        return shard

    def share(self, names: Collection[str], source: ShardingStrategy) -> None:
        """Keep the shards that `source` keeps of these parameters, and no others.

        Each module still gathers a parameter by itself: whether it is gathered is known to the parameter, which is not
        shared.
        """
        for name in self.parameters:
            if name in names:
                self.local(name).data = source.local(name).data

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that the parameter had before it was partitioned."""
        return self._shapes[name]

    def reshard(self) -> None:
        """Free whatever is still gathered: the next pass may follow an update, or train other blocks.

        Blocks that got no gradient have no hook that would free them, and small parameters stay gathered by design.
        """
        self.engine.optimizer.empty_partition_cache()


def partition(
    module: nn.Module,
    blocks: Blocks,
    value: Callable[[str, nn.Parameter], Tensor],
    config: Mapping[str, Any],
    grid: Grid,
    device: torch.device,
    *,
    reduces_at_step: bool,
) -> Zero3:
    """Let DeepSpeed shard the parameters of a module.

    Parameters are materialized and sharded one repeated block at a time, and one by one outside these blocks: at no time
    does this process hold more of the model whole.

    value: (name, the module's parameter of that name so far) -> the values of that parameter.
    """
    import deepspeed

    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    for names in _groups(module, blocks):
        materialize(module, names, value)
        current = dict(module.named_parameters())
        group = nn.ParameterList([current[name] for name in names])
        deepspeed.zero.Init(module=group, config_dict_or_path=dict(config), data_parallel_group=grid.shards.group)
    for path in blocks.repeated:
        # Gathered and freed as one. Were its parts gathered singly, recomputing a checkpointed block in the backward pass
        # would free them before their gradients arrive.
        deepspeed.utils.set_z3_leaf_module(module.get_submodule(path), True)
    engine = deepspeed.initialize(model=module, config=dict(config))[0]
    return Zero3(module, engine, shapes, grid, device, reduces_at_step=reduces_at_step)


def _groups(module: nn.Module, blocks: Blocks) -> list[list[str]]:
    """The parameters of each repeated block together, every other one alone."""
    members = {name: block for block in blocks.repeated for name in blocks.members[block]}
    groups: dict[str, list[str]] = {}
    for name, _ in module.named_parameters():
        groups.setdefault(members.get(name, name), []).append(name)
    return list(groups.values())
