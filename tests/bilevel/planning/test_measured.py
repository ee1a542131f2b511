"""The plan against what torch really allocates over two steps on the CPU. `benchmarks/memory.py` has more and larger cases.

The plan follows the same operations, so it should be within a few percent; 15% is what is promised.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[3]
TOLERANCE = 0.15
SMALL = {"hidden": 128, "layers": 4, "vocabulary": 1024, "length": 64}


@pytest.fixture(scope="module")
def memory() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_memory", ROOT / "benchmarks" / "memory.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "settings",
    [
        {"blocks": 2},
        {"blocks": 2, "checkpointing": True, "micro": 2},
        {"blocks": None, "dtype": "float32"},
        {"blocks": None, "micro": 1, "tied": True},
        {"blocks": 1, "dtype": "float32", "checkpointing": True},
        {"blocks": None, "rank": 4, "dtype": "float32", "checkpointing": True},
    ],
)
def test_plan_is_within_tolerance_of_the_measured_peak(memory: ModuleType, settings: dict, tmp_path: Path) -> None:  # type: ignore[type-arg]
    case = memory.Case(**SMALL, **settings)
    problem = memory.problem(case, tmp_path)
    assert memory.planned(case, problem) == pytest.approx(memory.torch_peak(case, problem), rel=TOLERANCE)
