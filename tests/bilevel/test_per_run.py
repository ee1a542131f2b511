import numpy as np
import pytest
import torch

from bilevel.backend import Vector
from bilevel.errors import InputError
from bilevel.per_run import PerRun, at_least

A, B = PerRun.of([1.0, 4.0]), PerRun.of([2.0, -3.0])


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (A + B, [3, 1]), (A + 1, [2, 5]), (1 + A, [2, 5]), (A - B, [-1, 7]), (1 - A, [0, -3]), (A * B, [2, -12]),
        (2 * A, [2, 8]), (A / 2, [0.5, 2]), (1 / A, [1, 0.25]), (A**0.5, [1, 2]), (-A, [-1, -4]), (abs(B), [2, 3]),
        (sum([A, B]), [3, 1]), (at_least(0.0, B), [2, 0]), (PerRun(np.float64(2) * A.values), [2, 8]),
    ],
)  # fmt: skip
def test_the_arithmetic_is_that_of_each_run(found: PerRun, expected: list[float]) -> None:
    assert found.values.tolist() == expected


def test_tensors_and_vectors_are_scaled_run_by_run() -> None:
    ones = torch.ones(2, 3, dtype=torch.float32)
    assert (A * ones).tolist() == [[1.0] * 3, [4.0] * 3]
    assert (A * ones).dtype == torch.float32
    assert (A * Vector({"v": ones}, whole=True)).parts["v"].tolist() == [[1.0] * 3, [4.0] * 3]


def test_a_comparison_holds_if_it_holds_in_every_run() -> None:
    assert A > 0
    assert A
    assert not A < 0
    assert A != B
    assert at_least(0.0, -1.5) == 0.0


@pytest.mark.parametrize(
    "ask", [lambda: A > 2, lambda: bool(PerRun.of([0.0, 1.0])), lambda: PerRun.of([1.0, 2.0]) == A, lambda: max(A, 2.0)]
)
def test_a_decision_on_which_the_runs_do_not_agree_is_refused(ask) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=r"<lambda> \(test_per_run.py, line \d+\) decides for all runs at once"):
        ask()


@pytest.mark.parametrize(
    "ask", [lambda: float(A), lambda: range(A), lambda: np.array([A, B]), lambda: list(A), lambda: f"{A:.1f}"]
)
def test_a_single_number_is_refused(ask) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match="asks for"):
        ask()
