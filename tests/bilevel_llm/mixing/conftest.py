"""Runs as `bilevel run` leaves them, without the running: the recipe, and the problem's own weights.json."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from bilevel.plain import to_plain
from bilevel.run_directory import RunDirectory
from bilevel_llm.reweighting.problem import LLMReweighting, Source, ValidationSet
from tests.bilevel_llm.reweighting.conftest import make_tokenizer

AVERAGE = {"web": 0.5, "books": 0.3, "chat": 0.2}
FINAL = {"web": 0.25, "books": 0.25, "chat": 0.5}


def alpaca(name: str, rows: int) -> list[dict[str, Any]]:
    """Rows of different lengths, each with fields that nobody reads."""
    return [
        {
            "instruction": f"{name} {i}",
            "input": "",
            "output": "é" * (i % 7 + 1),
            "id": i,
            "meta": {"n": [i, None], "x": 0.1 * i},
        }
        for i in range(rows)
    ]


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory whose weights are never read."""
    directory = tmp_path_factory.mktemp("model")
    make_tokenizer().save_pretrained(directory)
    (directory / "config.json").write_text("{}")
    save_file({"w": np.zeros(1, np.float32)}, directory / "model.safetensors")
    return directory


@pytest.fixture
def make_problem(tokenizer_only: Path, tmp_path: Path) -> Callable[..., LLMReweighting]:
    """Sources by name (rows, or files) -> a problem; 40, 20 and 10 rows by default."""

    def make(sources: Mapping[str, Any] | None = None, validation: Any = None, **settings: Any) -> LLMReweighting:
        data = sources or {"web": alpaca("web", 40), "books": alpaca("books", 20), "chat": alpaca("chat", 10)}
        files = {
            name: rows if isinstance(rows, str) else str(write_jsonl(tmp_path / f"{name}.jsonl", rows))
            for name, rows in data.items()
        }
        target = write_jsonl(tmp_path / "target.jsonl", validation or alpaca("target", 3))
        return LLMReweighting(
            str(tokenizer_only), [Source(*item) for item in files.items()], [ValidationSet(str(target))],
            **{"max_length": 40, **settings},
        )  # fmt: skip

    return make


@pytest.fixture
def make_run(make_problem: Callable[..., LLMReweighting], tmp_path: Path) -> Callable[..., Path]:
    """A run directory. average, final: the weights it learned."""

    def make(
        sources: Any = None, average: Mapping[str, float] = AVERAGE, final: Mapping[str, float] = FINAL, **settings: Any
    ) -> Path:
        problem = make_problem(sources, **settings)
        directory = RunDirectory(tmp_path / "run")
        recipe = {"problem": {"name": "llm-reweighting", **to_plain(problem)}, "solver": {"name": "not-installed"}}
        directory.create(recipe)
        history = [{"upper": average, "gap": 0.0}, {"upper": final}]  # no gap: a step that did not move the weights
        directory.write(problem.artifacts(history, {"seed": 0}))
        return directory.path

    return make
