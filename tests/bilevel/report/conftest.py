"""Comparisons as `bilevel compare` writes them, and real models for runs to be reported."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.bilevel_llm.conftest import data, model_directory, problem  # noqa: F401 (fixtures)

COMPARISON: dict[str, Any] = {
    "methods": ["uniform", "learned"],
    "seeds": [0, 1, 2],
    "unit": "tokens",
    "metric_info": {"loss/target": {"better": "lower", "unit": "nats"}, "exact match": {"better": "higher"}},
    "cells": [
        {
            "method": method,
            "seed": seed,
            "metrics": {"loss/target": loss + 0.01 * seed, "exact match": 0.2 if seed else None},
            "cost": {"gpu_seconds": 60.0 + seed, "size": 100_000},
        }
        for method, loss in (("uniform", 2.40), ("learned", 2.31))
        for seed in (0, 1, 2)
    ],
    "differences": [
        {"method": "learned", "against": "uniform", "metric": "exact match", "mean": 0.01, "low": -0.02, "high": 0.04},
        {"method": "learned", "against": "uniform", "metric": "loss/target", "mean": -0.09, "low": -0.12, "high": -0.06},
    ],
}


@pytest.fixture
def make_comparison(tmp_path: Path) -> Callable[..., Path]:
    def make(**changes: Any) -> Path:
        where = tmp_path / "comparison"
        where.mkdir()
        (where / "comparison.json").write_text(json.dumps({**COMPARISON, **changes}))
        return where

    return make
