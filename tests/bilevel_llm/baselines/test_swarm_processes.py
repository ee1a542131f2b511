"""A swarm on several processes finds what one finds."""

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from torch import nn

from bilevel import SGD
from bilevel.blocks import Blocks
from bilevel_backends.sharding.strategy import ShardingStrategy
from bilevel_backends.torch_backend import TorchBackend
from bilevel_backends.variable import ModuleVariable
from bilevel_llm.baselines.base import Task
from bilevel_llm.baselines.swarm import Swarm
from tests.bilevel_llm.baselines.test_less import ThreadBackend, Threads


@dataclasses.dataclass
class Loading(ThreadBackend):
    """Also reads the weights of a model whose initialization was deferred, before it is dealt to the processes."""

    def shard_module(self, module: nn.Module, blocks: Blocks, like: ModuleVariable | None) -> ShardingStrategy:
        TorchBackend.shard_module(self, module, blocks, like)
        return super().shard_module(module, blocks, like)


@pytest.mark.parametrize("shards_moments", [False, True])
def test_processes_agree_with_one(task: Callable[..., Task], shards_moments: bool) -> None:
    """Two threads as two processes. 1e-5: float32 losses, summed in another order."""
    swarm = Swarm(runs=5, steps=2, lr=0.3, optimizer=SGD())
    meet, values = threading.Barrier(2), [None, None]
    tasks = [
        dataclasses.replace(
            task(), recipe={}, backend=Loading(processes=Threads(rank, meet, values), shards_moments=shards_moments)
        )
        for rank in range(2)
    ]
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(swarm.find, tasks))
    one = swarm.find(task())
    assert both[0].weights == both[1].weights
    losses = [[row[4] for row in outcome.tables[0].rows] for outcome in (one, *both)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert losses[1] == losses[2]
    assert both[0].cost.tokens == one.cost.tokens
