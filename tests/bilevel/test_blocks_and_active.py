import copy

import pytest
from torch import nn

from bilevel import LISA, All, InputError, find_blocks


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))


class Model(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(5, 4)
        self.positions = nn.Embedding(3, 4)
        self.layers = nn.ModuleList(Residual() for _ in range(6))
        self.norm = nn.LayerNorm(4)
        self.out = nn.Linear(4, 5, bias=False)
        if tied:
            self.out.weight = self.tokens.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.out


def test_blocks_are_the_outermost_stack_and_what_stands_around_it() -> None:
    blocks = find_blocks(Model())
    assert blocks.repeated == tuple(f"layers.{i}" for i in range(6))  # not the experts inside
    assert blocks.members["embedding"] == ("tokens.weight", "positions.weight")
    assert blocks.members["head"] == ("out.weight",)
    assert blocks.members["rest"] == ("norm.weight", "norm.bias")
    assert not blocks.head_is_embedding


def test_every_parameter_is_in_exactly_one_block() -> None:
    for module in (Model(), Model(tied=True), nn.Linear(2, 2)):
        blocks = find_blocks(module)
        assert sorted(blocks.parameters(blocks.names)) == sorted(name for name, _ in module.named_parameters())


def test_a_tied_head_is_the_embedding() -> None:
    blocks = find_blocks(Model(tied=True))
    assert blocks.head_is_embedding
    assert "head" not in blocks.members


def test_parameters_that_were_frozen_from_the_start_belong_to_no_block() -> None:
    module = Model()
    module.layers[2].requires_grad_(False)
    assert "layers.2" not in find_blocks(module).members


def test_a_module_without_a_stack_is_one_block() -> None:
    assert find_blocks(nn.Linear(2, 2)).members == {"rest": ("weight", "bias")}


def test_lisa_draws_the_asked_number_and_keeps_it_for_a_period() -> None:
    blocks, rule = find_blocks(Model()), LISA(blocks=2, period=3)
    draws = [rule.at(t, blocks, seed=0) for t in range(30)]
    assert all(len(draw) == 2 for draw in draws)
    assert all(draws[t] == draws[t - t % 3] for t in range(30))
    assert len(set(draws)) > 3
    assert set().union(*draws) == set(blocks.repeated)


def test_lisa_is_a_function_of_seed_and_step_so_replicas_agree() -> None:
    rule, seed = LISA(blocks=2, period=3), 5
    twin = find_blocks(copy.deepcopy(Model()))
    assert [rule.at(t, find_blocks(Model()), seed) for t in (7, 1)] == [rule.at(t, twin, seed) for t in (7, 1)]
    assert any(rule.at(t, twin, 5) != rule.at(t, twin, 6) for t in range(30))


def test_lisa_draws_every_block_equally_often() -> None:
    blocks, rule = find_blocks(Model()), LISA(blocks=2, period=1)
    counts = [sum(name in rule.at(t, blocks, seed=0) for t in range(3000)) for name in blocks.repeated]
    assert all(abs(count - 1000) < 5 * (3000 * 1 / 3 * 2 / 3) ** 0.5 for count in counts)


def test_replicas_have_draws_of_their_own_if_they_are_independent() -> None:
    """Two of six blocks, each replica for itself: the same ones in one of 15 periods, here 2 of 30 ± 1.4."""
    blocks, rule = find_blocks(Model()), LISA(blocks=2, period=1, independent=True)
    draws = [[rule.of_replica(number).at(t, blocks, seed=0) for t in range(30)] for number in (0, 1)]
    assert sum(one == other for one, other in zip(*draws, strict=True)) <= 8
    assert draws[0] == [LISA(blocks=2, period=1).at(t, blocks, seed=0) for t in range(30)]
    shared = LISA(blocks=2, period=1)
    assert shared.of_replica(1) is shared


def test_embedding_head_and_rest_follow_their_settings() -> None:
    blocks = find_blocks(Model())
    outside = {"embedding", "head", "rest"}
    assert not LISA().at(0, blocks, 0) & outside
    assert LISA(embedding="train", rest="train").at(0, blocks, 0) & outside == {"embedding", "rest"}
    assert LISA(head="train").at(0, blocks, 0) & outside == {"head"}


def test_all_means_all() -> None:
    blocks = find_blocks(Model())
    assert All().at(3, blocks, 0) == blocks.names


def test_more_blocks_than_there_are_is_refused() -> None:
    with pytest.raises(InputError, match="has 6 repeated blocks"):
        LISA(blocks=7).at(0, find_blocks(Model()), 0)


def test_different_settings_for_tied_weights_are_refused() -> None:
    with pytest.raises(InputError, match="ties the two"):
        LISA(head="train").at(0, find_blocks(Model(tied=True)), 0)


def test_an_unknown_block_is_named() -> None:
    with pytest.raises(InputError, match="no block is named 'layers.9'"):
        find_blocks(Model()).parameters(frozenset({"layers.9"}))
