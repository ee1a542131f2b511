"""Reweighting of tiny language models, the same in one process and in two."""

from pathlib import Path
from typing import Any

from bilevel import LISA, AdamW, Backend, ScaleBiO, fit
from bilevel_llm.data.settings import Source, ValidationSet
from bilevel_llm.reweighting.problem import LLMReweighting


def reweight(backend: Backend, settings: dict[str, Any], output: Path) -> None:
    problem = LLMReweighting(
        model=settings["model"],
        sources=[Source(name, settings["data"][name]) for name in ("clean", "noise")],
        validation=[ValidationSet(settings["data"]["target"])],
        max_length=48,
        batch_size=8,
    )
    solver = ScaleBiO(penalty=5.0, lr_x=0.05, lr_z=1e-3, optimizer_z=AdamW(eps=1e-5), warmup=1)
    fit(problem, solver, backend, steps=4, active=LISA(blocks=1, period=2), output=output, checkpoint_every=4)
