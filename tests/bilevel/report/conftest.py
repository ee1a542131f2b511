"""Run directories as a run leaves them, made in a moment, with weights that go where a test wants them."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from bilevel.record import Record
from tests.bilevel_llm.conftest import data, model_directory, problem  # noqa: F401 (fixtures)

Make = Callable[..., Path]
STEPS, WARMUP = 40, 8


@pytest.fixture
def make_run(tmp_path: Path) -> Make:
    def make(
        name: str = "run",
        *,
        seed: int = 0,
        final: dict[str, float] | None = None,
        steps: int = STEPS,
        planned: int = STEPS,
        penalty: float = 10.0,
        trust: Sequence[str] | None = ("settled: no weight changed by more than 0.001 over the last quarter",),
        flags: dict[str, str] | None = None,
        data_hash: str = "0f" * 32,
    ) -> Path:
        final = final or {"web": 0.6, "books": 0.3, "chat": 0.1}
        where = tmp_path / name
        where.mkdir()
        recipe = {
            "problem": {"name": "llm-reweighting", "model": "models/tiny"},
            "solver": {"name": "scalebio", "penalty": penalty},
            "run": {"steps": planned, "output": str(where), "seed": seed},
        }
        (where / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        records = history(final, steps=steps, seed=seed, penalty=penalty)
        (where / "metrics.jsonl").write_text("".join(record.to_json() + "\n" for record in records))
        if trust is not None and records:
            learned: dict[str, Any] = {
                "sources": records[-1].upper,
                "steps": steps,
                "trust": list(trust),
                "flags": flags or {},
                "seed": seed,
                "versions": {"bilevel": "0.1.0", "torch": "2.13.0"},
                "data": {"sources": {key: {"rows": 1234, "hash": data_hash} for key in final}},
                "model": {"name": "models/tiny", "hash": "ab" * 32},
            }
            (where / "weights.json").write_text(json.dumps(learned))
        return where

    return make


def history(final: dict[str, float], *, steps: int = STEPS, seed: int = 0, penalty: float = 10.0) -> list[Record]:
    """Weights held for the warm-up, then in a straight line to `final`, with a noise that leaves their sum at 1."""
    draw = np.random.default_rng(seed)
    names, records = list(final), []
    for t in range(steps):
        warm = t < WARMUP
        share = 0.0 if warm else (t - WARMUP + 1) / (STEPS - WARMUP)
        noise = 0.0 if warm else 0.004 * draw.normal(size=len(names))
        values = (1 - share) / len(names) + share * np.array(list(final.values())) + (noise - np.mean(noise))
        parts = {name: 3.0 + 0.1 * i + 0.05 * draw.normal() for i, name in enumerate(names)}
        metrics, named = {"lower_loss": 3.1}, {"lower_parts": parts}
        if not warm:
            metrics |= {
                "upper_loss": 2.5,
                "gap": 0.01 * draw.normal(),
                "penalty": penalty,
                "grad_norm_x": abs(draw.normal()),
            }
            named |= {"upper_parts": {"target": 2.5 + 0.1 * draw.normal()},
                      "gap_parts": {name: 0.01 * draw.normal() for name in names}}  # fmt: skip
        records.append(Record(
            t, 0.5 + 0.01 * abs(draw.normal()), dict(zip(names, values.tolist(), strict=True)), not warm, metrics, named,
            active=["model"], optimizer_bytes=1_000_000 if warm else 3_000_000, size=500,
        ))  # fmt: skip
    return records


COMPARISON: dict[str, Any] = {
    "methods": ["uniform", "learned"],
    "seeds": [0, 1, 2],
    "metric_info": {"loss/target": {"better": "lower", "unit": "nats"}, "exact match": {"better": "higher"}},
    "cells": [
        {
            "method": method,
            "seed": seed,
            "metrics": {"loss/target": loss + 0.01 * seed, "exact match": 0.2 if seed else None},
            "cost": {"gpu_seconds": 60.0 + seed, "tokens": 100_000},
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
