from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.tensor import Replicate, Shard

from bilevel_backends.sharding.fully_sharded import FullySharded, _holder


def parameter(rows: int, mesh: tuple[int, ...], place: tuple[int, ...]) -> Any:
    """A parameter of this many rows of two numbers, on a mesh whose last dimension shards it and whose others replicate it."""
    dims = SimpleNamespace(size=lambda dim: mesh[dim], get_local_rank=lambda dim: place[dim])
    placements = (*(Replicate() for _ in mesh[1:]), Shard(0))
    return SimpleNamespace(shape=(rows, 2), numel=lambda: 2 * rows, device_mesh=dims, placements=placements)


@pytest.mark.parametrize(
    ("mesh", "place", "stretch", "holder"),
    [
        ((2,), (1,), range(6, 10), (0, 1)),
        ((4,), (2,), range(8, 10), (0, 1)),
        ((4,), (3,), range(10, 10), (0, 1)),
        ((3, 2), (2, 1), range(6, 10), (2, 3)),
    ],
)
def test_a_shard_is_whole_rows_and_each_of_its_holders_knows_which_one_it_is(
    mesh: tuple[int, ...], place: tuple[int, ...], stretch: range, holder: tuple[int, int]
) -> None:
    p = parameter(5, mesh, place)
    module = FullySharded.__new__(FullySharded)
    module._sharded = lambda name: p  # type: ignore[method-assign]
    module.local = lambda name: SimpleNamespace(numel=lambda: len(stretch))  # type: ignore[method-assign,assignment,return-value]
    assert module.stretch("weight") == stretch
    assert _holder(p) == holder
