"""Reweighting and fine-tuning of tiny language models, the same in one process and in two."""

from pathlib import Path
from typing import Any

from bilevel import LISA, AdamW, Backend, Descent, ScaleBiO, fit
from bilevel_llm.data.settings import Source, ValidationSet
from bilevel_llm.finetuning.problem import FineTuning
from bilevel_llm.model.lora import LoRA
from bilevel_llm.reweighting.problem import LLMReweighting


def reweight(backend: Backend, settings: dict[str, Any], output: Path, lora: LoRA | None = None) -> None:
    problem = LLMReweighting(
        model=settings["model"],
        sources=[Source(name, settings["data"][name]) for name in ("clean", "noise")],
        validation=[ValidationSet(settings["data"]["target"])],
        max_length=48,
        batch_size=8,
        lora=lora,
    )
    solver = ScaleBiO(penalty=5.0, lr_x=0.05, lr_z=1e-3, optimizer_z=AdamW(eps=1e-5), warmup=1)
    # of adapters, one block stays when the draw changes: a gradient left from an earlier step would be seen
    active = LISA(blocks=1, period=2) if lora is None else LISA(blocks=2, period=2)
    fit(problem, solver, backend, steps=4, active=active, output=output, checkpoint_every=4)


WHOLE = ("qwen2",)  # families that are also reweighted where every process has all parameters
TUNINGS: dict[str, LoRA | None] = {"full": None, "lora": LoRA(rank=2)}


def tune(backend: Backend, settings: dict[str, Any], lora: LoRA | None, output: Path) -> None:
    problem = FineTuning(
        model=settings["model"],
        data=settings["data"]["clean"],
        validation=[ValidationSet(settings["data"]["target"])],
        max_length=48,
        batch_size=8,
        lora=lora,
    )
    solver = Descent(lr=1e-3, optimizer=AdamW(eps=1e-5), evaluate_every=2, evaluation_batches=2)
    fit(problem, solver, backend, steps=4, output=output, checkpoint_every=4)
