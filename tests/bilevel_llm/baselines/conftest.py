"""Tiny models and data, as for the reweighting tests."""

from collections.abc import Callable
from typing import Any

import pytest

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
