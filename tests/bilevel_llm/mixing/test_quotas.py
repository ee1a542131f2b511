import numpy as np
import pytest

from bilevel_llm.mixing.quotas import largest_remainder, largest_total, redistribute

DRAWS = [np.random.default_rng(seed).dirichlet(np.ones(k)) for seed, k in enumerate((2, 3, 5, 8))]


def test_quotas_are_the_shares_rounded_to_whole_rows() -> None:
    assert largest_remainder(np.array([0.5, 0.3, 0.2]), 10).tolist() == [5, 3, 2]
    assert largest_remainder(np.array([0.45, 0.35, 0.2]), 10).tolist() == [5, 3, 2]  # .5 and .5 are left: the earlier one
    assert largest_remainder(np.array([0.41, 0.33, 0.26]), 10).tolist() == [4, 3, 3]
    assert largest_remainder(np.array([1.0, 0.0]), 7).tolist() == [7, 0]


@pytest.mark.parametrize("weights", DRAWS)
def test_quotas_sum_to_the_total_and_miss_no_share_by_a_row(weights: np.ndarray) -> None:
    for total in range(200):
        counts = largest_remainder(weights, total)
        assert counts.sum() == total
        assert (abs(counts - weights * total) < 1).all()


@pytest.mark.parametrize("weights", DRAWS)
def test_the_largest_total_is_the_one_that_trying_all_finds(weights: np.ndarray) -> None:
    capacity = np.random.default_rng(9).integers(1, 30, len(weights))
    fitting = [n for n in range(2000) if (largest_remainder(weights, n) <= capacity).all()]
    assert largest_total(weights, capacity) == max(fitting)


def test_a_source_without_weight_does_not_bound_the_total() -> None:
    assert largest_total(np.array([1.0, 0.0]), np.array([12, 0])) == 12
    assert largest_total(np.array([0.9, 0.1]), np.array([12, 0])) == 5  # 4.5 and 0.5: the row goes to the earlier one


def test_what_a_short_source_lacks_is_shared_by_the_weights_of_the_others() -> None:
    assert redistribute(np.array([0.5, 0.3, 0.2]), np.array([10, 100, 100]), 60).tolist() == [10, 30, 20]
    assert redistribute(np.array([0.5, 0.3, 0.2]), np.array([10, 20, 100]), 60).tolist() == [
        10,
        20,
        30,
    ]  # a second one runs out
    assert redistribute(np.array([0.5, 0.5, 0.0]), np.array([5, 5, 100]), 60).tolist() == [5, 5, 0]


@pytest.mark.parametrize("weights", DRAWS)
def test_redistribution_keeps_the_capacity_and_the_total(weights: np.ndarray) -> None:
    capacity = np.random.default_rng(5).integers(1, 30, len(weights))
    for total in range(0, int(capacity.sum()) + 20, 7):
        counts = redistribute(weights, capacity, total)
        assert (counts <= capacity).all()
        assert counts.sum() == min(total, capacity.sum())
