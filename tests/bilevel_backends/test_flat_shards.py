import pytest
import torch

from bilevel_backends.sharding.flat import flat_shard


@pytest.mark.parametrize(("elements", "world_size"), [(12, 4), (10, 4), (2, 4), (7, 1)])
def test_the_shards_of_all_processes_are_the_tensor_followed_by_zeros(elements: int, world_size: int) -> None:
    flat = torch.arange(1.0, elements + 1)
    size = -(-elements // world_size)
    shards = [flat_shard(flat, size, rank) for rank in range(world_size)]
    assert all(shard.shape == (size,) for shard in shards)
    joined = torch.cat(shards)
    assert torch.equal(joined[:elements], flat)
    assert not joined[elements:].any()
