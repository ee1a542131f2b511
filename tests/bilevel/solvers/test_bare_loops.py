"""Every solver against a bare loop of its algorithm, in plain PyTorch; these are the loops of `benchmarks/overhead.py`."""

import pytest
import torch

from benchmarks.overhead import AGREE, CASES, METHODS, run_bare, run_ours


@pytest.mark.parametrize("problem", ["logreg", "quadratic"])
@pytest.mark.parametrize("name", METHODS)
def test_a_solver_arrives_where_a_bare_loop_of_its_algorithm_does(name: str, problem: str) -> None:
    method, case = METHODS[name], CASES[problem]
    _, there = run_bare(method, case, 2, 5)
    _, here = run_ours(method, case, 2, 5, None)
    torch.testing.assert_close(here, there, rtol=AGREE, atol=AGREE)
