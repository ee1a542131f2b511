"""Rows of different lengths in one matrix."""

import numpy as np

from bilevel_llm.data.padding import PaddedRows

ROWS = [
    (np.array([5, 6, 7, 8], np.int32), np.array([False, False, True, True])),
    (np.array([9, 4], np.int32), np.array([False, True])),
]


def test_every_target_is_predicted_from_the_place_before_it() -> None:
    padded = PaddedRows.of(ROWS)
    assert padded.ids.tolist() == [[5, 6, 7, 8], [9, 4, 0, 0]]
    assert padded.ids.flatten()[padded.positions].tolist() == [6, 7, 9]
    assert padded.targets.tolist() == [7, 8, 4]
    assert padded.row.tolist() == [0, 0, 1]


def test_a_label_on_the_first_token_is_predicted_from_nowhere() -> None:
    """Nor from the end of the row before."""
    labelled = (ROWS[1][0], np.array([True, True]))
    assert PaddedRows.of([ROWS[0], labelled]).targets.tolist() == [7, 8, 4]
