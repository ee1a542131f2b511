"""The plan's memory against what CUDA's allocator held. Run by `make test-gpu`."""

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
    steps = Steps(case, p, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    steps.run(2)
    assert planned(case, p) == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.15)
