import pytest

from bilevel_backends.sharding.flat import flat_stretch


@pytest.mark.parametrize(("elements", "world_size"), [(12, 4), (10, 4), (2, 4), (7, 1), (0, 2)])
def test_the_stretches_of_all_processes_are_the_tensor_one_after_the_other(elements: int, world_size: int) -> None:
    size = -(-elements // world_size)
    stretches = [flat_stretch(elements, size, rank) for rank in range(world_size)]
    assert all(len(stretch) <= size for stretch in stretches)
    assert [place for stretch in stretches for place in stretch] == list(range(elements))
