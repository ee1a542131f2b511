"""Run directories as a run leaves them, made in a moment, with weights that go where a test wants them."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml

from bilevel.account import Account, Finding, Table
from bilevel.record import Record
from bilevel_llm.reweighting.problem import LLMReweighting

Make = Callable[..., Path]
STEPS, WARMUP = 40, 8
SETTLED = Finding("still-moving", False, "settled: no weight changed by more than 0.001 over the last quarter")


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
        findings: Sequence[Finding] | None = (SETTLED,),
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
        if findings is not None and records:
            account = Account(
                steps=steps,
                seed=seed,
                versions={"bilevel": "0.1.0", "torch": "2.13.0"},
                labels=LLMReweighting.labels,
                findings=findings,
                tables=[Table("Training data", ("source", "rows"), [(key, 1234) for key in final])],
                identity={
                    "data": {"sources": {key: {"rows": 1234, "hash": data_hash} for key in final}},
                    "model": {"name": "models/tiny", "hash": "ab" * 32},
                },
            )
            (where / "account.json").write_text(account.to_json())
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
