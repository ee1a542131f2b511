from collections import Counter

import numpy as np
import pytest

from bilevel import InputError, Stratified
from bilevel.data import Stream, generator


def test_random_numbers_depend_on_every_argument_and_on_nothing_else() -> None:
    first = generator(1, 2, 3).normal(size=4)
    assert np.array_equal(first, generator(1, 2, 3).normal(size=4))
    for other in (generator(0, 2, 3), generator(1, 0, 3), generator(1, 2, 0), generator(1, 2)):
        assert not np.array_equal(first, other.normal(size=4))


def test_every_batch_has_every_stratum_and_the_remainder_goes_round() -> None:
    sampler = Stratified((50, 50, 50), batch_size=8, stream=1)
    counts = np.array([sampler.counts(i) for i in range(9)])
    assert (counts.sum(1) == 8).all()
    assert counts.min() >= 2
    assert (counts[:3].sum(0) == 8).all()  # equal over any k batches
    assert [len(sampler.batch(i, seed=0)) for i in range(9)] == [8] * 9


def test_a_stratum_is_used_up_before_a_row_comes_again() -> None:
    sampler = Stratified((10, 4), batch_size=4, stream=1)
    rows = [row for index in range(5) for stratum, row in sampler.batch(index, seed=0) if stratum == 0]
    assert sorted(rows) == list(range(10))


def test_a_batch_is_a_function_of_index_and_seed() -> None:
    sampler = Stratified((30, 20), batch_size=6, stream=1)
    straight = [sampler.batch(i, seed=3) for i in range(6)]
    assert [Stratified((30, 20), 6, 1).batch(i, seed=3) for i in (5, 0, 3)] == [straight[5], straight[0], straight[3]]
    assert sampler.batch(0, seed=4) != straight[0]


def test_the_mean_over_a_stratum_is_estimated_without_bias() -> None:
    """At a fixed index, over seeds, every row of a stratum comes equally often (5 standard errors of a binomial)."""
    sampler = Stratified((5, 7), batch_size=5, stream=1)
    seeds = 4000
    seen = Counter(pick for seed in range(seeds) for pick in sampler.batch(3, seed))
    for stratum, size in enumerate(sampler.sizes):
        expected = seeds * sampler.counts(3)[stratum] / size
        for row in range(size):
            assert abs(seen[stratum, row] - expected) < 5 * expected**0.5


def test_a_batch_too_small_for_the_strata_is_refused() -> None:
    with pytest.raises(InputError, match="set batch_size to at least 3"):
        Stratified((5, 5, 5), batch_size=2, stream=1)


def test_folds_are_disjoint_and_hold_all_rows_as_evenly_as_can_be() -> None:
    sampler = Stratified((10, 7), batch_size=4, stream=Stream.LOWER)
    folds = [{sample for index in range(12) for sample in sampler.batch(index, 5, (f, 3))} for f in range(3)]
    assert set().union(*folds) == {(0, row) for row in range(10)} | {(1, row) for row in range(7)}
    assert sum(map(len, folds)) == 17
    assert sorted(len([s for s in fold if s[0] == 0]) for fold in folds) == [3, 3, 4]


def test_a_walk_through_a_fold_takes_every_row_once_before_any_comes_again() -> None:
    sampler = Stratified((12,), batch_size=2, stream=Stream.LOWER)
    rows = [row for index in range(6) for _, row in sampler.batch(index, 0, (1, 2))]
    assert sorted(rows[:6]) == sorted(rows[6:])
    assert len(set(rows[:6])) == 6
    assert rows[:6] != rows[6:]


def test_strata_of_one_size_are_shuffled_differently() -> None:
    sampler = Stratified((50, 50), batch_size=20, stream=Stream.LOWER)
    first, second = ([row for stratum, row in sampler.batch(0, 0) if stratum == s] for s in (0, 1))
    assert first != second


def test_the_two_levels_draw_differently() -> None:
    upper, lower = (Stratified((50,), batch_size=20, stream=stream).batch(0, 0) for stream in (Stream.UPPER, Stream.LOWER))
    assert upper != lower
