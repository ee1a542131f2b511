"""Parameters that never train, such as those below adapters: replicas share them, and checkpoints have their checksums."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bilevel.blocks import Blocks
from bilevel.checkpoint import FixedFacts
from bilevel.checksum import checksum, written
from bilevel_backends.sharding.strategy import ShardingStrategy


def fixed_names(module: nn.Module, blocks: Blocks) -> list[str]:
    """The parameters that are in no block."""
    trained = set(blocks.parameters(blocks.names))
    return [name for name, _ in module.named_parameters() if name not in trained]


class Fixed:
    """The parameters of a variable, and of all its replicas, that never train.

    names: these parameters.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = frozenset(names)
        self._facts: dict[str, FixedFacts] | None = None

    def facts(self, sharding: ShardingStrategy) -> dict[str, FixedFacts]:
        """Name -> what is known of the parameter. They are computed at the first call, in which all processes take part.

        The checksums are those of whole tensors, however they are sharded.

        sharding: that of the variable or of a replica.
        """
        if self._facts is None:
            names = [name for name in sharding.parameters if name in self.names]
            sums = [_of_shard(sharding, name) for name in names]
            total = torch.stack(sums) if sums else torch.zeros(0, dtype=torch.int64)
            if sums and not sharding.whole:
                total = sharding.shards.all_reduce(total)
            self._facts = {
                name: FixedFacts(
                    str(sharding.parameters[name].dtype).removeprefix("torch."),
                    list(sharding.shape(name)),
                    written(value),
                )
                for name, value in zip(names, total.tolist(), strict=True)
            }
        return self._facts


def _of_shard(sharding: ShardingStrategy, name: str) -> Tensor:
    """The checksum of what this process holds of a parameter, without padding."""
    here = sharding.stretch(name)
    return checksum(sharding.local(name).reshape(-1)[: len(here)], here.start)
