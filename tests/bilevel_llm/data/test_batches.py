"""When micro-batches are built."""

from collections.abc import Callable

import pytest

from bilevel import InputError, Shard
from bilevel_llm.data.batches import MicroBatches
from bilevel_llm.reweighting.problem import LLMReweighting


def test_a_micro_batch_is_built_when_a_pass_comes_to_it_and_kept_for_the_next_pass() -> None:
    built: list[str] = []
    batches = MicroBatches(lambda part: built.append(part) or part, "abc")  # type: ignore[func-returns-value]
    assert len(batches) == 3
    assert not built
    passing = iter(batches)
    assert (next(passing), built) == ("a", ["a"])
    assert [*passing] == ["b", "c"]
    assert [*batches] == batches[:] == built == ["a", "b", "c"]


def test_a_batch_that_cannot_be_dealt_to_the_processes_is_refused_before_it_is_built(
    problem: Callable[..., LLMReweighting],
) -> None:
    with pytest.raises(InputError, match="a batch of 10 cannot be dealt evenly to 3 processes"):
        problem().lower_batch(0, Shard(world_size=3))
