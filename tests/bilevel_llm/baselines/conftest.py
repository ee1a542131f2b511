"""Tiny models and data, as for the reweighting tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from bilevel.run_settings import RunSettings
from bilevel_backends.torch_backend import TorchBackend
from bilevel_llm.baselines.base import Task
from bilevel_llm.reweighting.problem import LLMReweighting


@pytest.fixture
def task(problem: Callable[..., LLMReweighting]) -> Callable[..., Task]:
    """A prepared task: 40, 30 and 24 rows of the sources clean, other and noise; the target is like clean."""

    def make(family: str = "llama", *, steps: int = 6, seed: int = 0, **settings: Any) -> Task:
        made = problem(family, **settings)
        made.prepare()
        return Task(made, TorchBackend(device="cpu"), RunSettings(steps, seed=seed))

    return make


@pytest.fixture
def recipe(model_directory: Callable[[str], Path], data: dict[str, str], tmp_path: Path) -> Path:
    """A recipe whose solver has a step size and an optimizer of its own; its output is tmp_path/run."""
    tree = {
        "problem": {
            "name": "llm-reweighting", "model": str(model_directory("llama")), "max_length": 64, "batch_size": 9,
            "sources": [{"name": name, "path": data[name]} for name in ("clean", "other", "noise")],
            "validation": [{"path": data["target"]}],
        },
        "solver": {"name": "scalebio", "lr_z": 2e-3, "optimizer_z": {"name": "adamw", "weight_decay": 0.25}},
        "backend": {"name": "torch", "device": "cpu"},
        "run": {"steps": 9, "output": str(tmp_path / "run")},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "recipe.yaml"
