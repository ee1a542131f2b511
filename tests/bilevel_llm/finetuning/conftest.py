"""The tiny models and data of the reweighting tests, and short fine-tuning runs on them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from bilevel import Descent, fit
from bilevel.active import Active
from bilevel_backends.torch_backend import TorchBackend
from bilevel_llm.finetuning.problem import FineTuning
from bilevel_llm.reweighting.problem import ValidationSet
from tests.bilevel_llm.reweighting.conftest import data, model_directory

__all__ = ["data", "model_directory"]


class Keeping(TorchBackend):
    """Remembers the modules it was given, so that a test can look at them after the run."""

    def place(self, name: str, *args: Any, **kwargs: Any) -> Any:
        variable = super().place(name, *args, **kwargs)
        self.__dict__.setdefault("modules", {})[name] = variable.module
        return variable


@pytest.fixture
def tuning(model_directory: Callable[[str], Path], data: dict[str, str]) -> Callable[..., FineTuning]:
    def make(family: str = "llama", **settings: Any) -> FineTuning:
        fields: dict[str, Any] = {
            "model": str(model_directory(family)),
            "data": data["clean"],
            "validation": [ValidationSet(data["target"])],
            "max_length": 64,
            "batch_size": 8,
        }
        return FineTuning(**{**fields, **settings})

    return make


def train(
    problem: FineTuning,
    output: Path | None = None,
    *,
    steps: int = 3,
    lr: float = 1e-2,
    active: Active | None = None,
    resume: bool = False,
    **backend: Any,
) -> nn.Module:
    """Train, and return the tuned module."""
    keeping = Keeping(device="cpu", **backend)
    fit(problem, Descent(lr=lr, evaluate_every=2), keeping, steps=steps, active=active, output=output, resume=resume)
    module: nn.Module = keeping.modules["z"]  # type: ignore[attr-defined]
    return module
