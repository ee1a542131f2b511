"""Shards, and the messages in which gradients go to other processes."""

import pytest
import torch

from bilevel_backends.sharding.bucket import Bucket
from bilevel_backends.sharding.flat import FlatLayout, flat_stretch


@pytest.mark.parametrize(("elements", "world_size"), [(12, 4), (10, 4), (2, 4), (7, 1), (0, 2)])
def test_the_stretches_of_all_processes_are_the_tensor_one_after_the_other(elements: int, world_size: int) -> None:
    size = -(-elements // world_size)
    stretches = [flat_stretch(elements, size, rank) for rank in range(world_size)]
    assert all(len(stretch) <= size for stretch in stretches)
    assert [place for stretch in stretches for place in stretch] == list(range(elements))


SHAPES = {"a": (3, 5), "b": (1,), "c": (4,), "d": (2, 2)}


def bucket(rows: int) -> Bucket:
    layout = FlatLayout({name: -(-torch.Size(shape).numel() // rows) for name, shape in SHAPES.items()})
    return Bucket(layout, rows, torch.float64, torch.device("cpu"))


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_each_process_finds_its_shards_of_the_sum_and_no_parameter_that_none_has(processes: int) -> None:
    """The first process has a and c, the last one c and b, nobody d."""
    draw = torch.Generator().manual_seed(0)
    gradients = {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in SHAPES.items()}
    sent = [bucket(processes) for _ in range(processes)]
    for each, name, weight in ((0, "a", 2.0), (0, "c", 1.0), (-1, "c", 0.5), (-1, "b", -1.0)):
        sent[each].add(name, gradients[name], weight)
    total = torch.stack([each.announce() for each in sent]).sum(0)
    found = [dict(one.shards(row)) for one, row in zip(sent, total, strict=True)]
    assert [list(shards) for shards in found] == [["a", "b", "c"]] * processes
    for name, weight in (("a", 2.0), ("b", -1.0), ("c", 1.5)):
        joined = torch.cat([shards[name] for shards in found])[: gradients[name].numel()]
        torch.testing.assert_close(joined, weight * gradients[name].flatten())


def test_a_process_that_has_every_gradient_need_not_read_what_the_others_had(monkeypatch: pytest.MonkeyPatch) -> None:
    full = bucket(1)
    for name, shape in SHAPES.items():
        full.add(name, torch.ones(shape), 1.0)
    row = full.announce()[0]
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: pytest.fail("a GPU would be waited for"))
    assert [name for name, _ in full.shards(row)] == list(SHAPES)
