"""Which places of rows are computed, and which of them stand for others."""

import torch

from bilevel_llm.data.packing import Packing


def test_common_beginnings_are_computed_once_and_what_predicts_nothing_not_at_all() -> None:
    ids = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 4, 0, 0], [5, 6, 7, 3, 0]])
    packing = Packing.of(ids, torch.tensor([1, 3, 6, 7, 13]))  # from 6 and 8; from 6 and 4; from 3
    assert packing.token.shape == (3, 4)
    computed = ids[packing.row, packing.place]
    assert sorted(computed.tolist()) == [3, 4, 5, 6, 7, 8]
    needed = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    assert torch.equal(computed[packing.token][needed], ids[:, :4][needed])
    assert torch.equal(packing.place[packing.token][needed], torch.arange(4).expand(3, 4)[needed])
    assert (packing.token[:, :2] == packing.token[0, :2]).all()
    assert packing.token[0, 2] == packing.token[2, 2] != packing.token[1, 2]


def test_equal_tokens_after_different_ones_are_computed_each() -> None:
    ids = torch.tensor([[1, 2, 3], [4, 2, 3]])
    assert len(Packing.of(ids, torch.tensor([1, 4])).row) == 4


def test_a_row_that_is_the_beginning_of_another_or_the_same_costs_nothing() -> None:
    ids = torch.tensor([[1, 2, 0, 0], [1, 2, 3, 4], [1, 2, 3, 4]])
    packing = Packing.of(ids, torch.tensor([0, 6, 10]))
    assert ids[packing.row, packing.place].tolist() == [1, 2, 3]
    assert torch.equal(packing.token[1], packing.token[2])


def test_every_beginning_of_a_row_is_computed_once_whatever_the_tokens() -> None:
    tokens = torch.tensor([0, 1, 255, 256, 65535, 65536, 2**24])
    ids = tokens[torch.randint(7, (40, 5), generator=torch.Generator().manual_seed(0))]
    packing = Packing.of(ids, torch.arange(200))
    beginnings = {tuple(row[:length].tolist()) for row in ids for length in range(1, 6)}
    assert len(packing.row) == len(beginnings)
