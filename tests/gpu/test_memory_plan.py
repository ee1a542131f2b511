"""The plan's memory against what CUDA's allocator held. Run by `make test-gpu`."""

import gc
from pathlib import Path

import pytest
import torch

from benchmarks.memory import Case, Steps, planned, problem

pytestmark = pytest.mark.gpu

CASES = [
    Case(hidden=1024, layers=12, length=512),
    Case(hidden=1024, layers=12, length=512, checkpointing=True),
    Case(hidden=1024, layers=12, length=512, blocks=None),
    Case(hidden=1024, layers=12, length=512, dtype="float32", micro=1),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_plan_is_within_15_percent_of_the_peak(case: Case, tmp_path: Path) -> None:
    p = problem(case, tmp_path)
    before = torch.cuda.memory_allocated()
    steps = Steps(case, p, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    steps.run(2)
    peak = torch.cuda.max_memory_allocated() - before
    assert planned(case, p) == pytest.approx(peak, rel=0.15)


def test_a_run_that_is_over_leaves_nothing_on_the_gpu(tmp_path: Path) -> None:
    """Without help of Python's collector of cycles, which may come too late."""
    case = Case(hidden=1024, layers=12, length=512, checkpointing=True)
    p = problem(case, tmp_path)
    before = torch.cuda.memory_allocated()
    gc.disable()
    try:
        Steps(case, p, device="cuda").run(2)
        left = torch.cuda.memory_allocated() - before
    finally:
        gc.enable()
    assert left < 2**26  # what cuBLAS keeps
