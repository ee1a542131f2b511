"""One process that skips no collective: what the tests on one GPU rely on, with gloo."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode

from bilevel_backends.processes import Processes
from tests.bilevel_backends.distributed.alone import skip_no_collective


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Processes]:
    monkeypatch.setattr(Processes, "__init__", Processes.__init__)  # to be restored
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    skip_no_collective()
    yield Processes(dist.get_rank(), dist.get_world_size())
    dist.destroy_process_group()


COLLECTIVES: dict[str, Callable[[Processes, Any], Any]] = {
    "all_reduce": lambda processes, shard: processes.all_reduce(shard.clone()),
    "reduce_scatter": lambda processes, shard: processes.reduce_scatter(shard[None], torch.empty_like(shard)),
    "all_gather": lambda processes, shard: processes.all_gather(shard)[0],
    "gather": lambda processes, shard: processes.gather(shard, 0),
    "all_gather_object": lambda processes, shard: processes.all_gather_object(shard)[0],
}


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_every_collective_is_carried_out_and_changes_nothing(collective: str, alone: Processes) -> None:
    shard = torch.arange(5.0)
    with CommDebugMode() as seen:
        found = COLLECTIVES[collective](alone, shard)
    assert seen.get_total_counts() > 0
    assert torch.equal(found, shard)
