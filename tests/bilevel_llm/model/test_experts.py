"""Mixtures of experts: what decides where tokens go must be the same every time, and must not be read by the host."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from bilevel import LISA, ScaleBiO, fit
from bilevel_backends.torch_backend import TorchBackend
from bilevel_llm.data.packing import Packing
from bilevel_llm.model.language_model import LanguageModel
from bilevel_llm.reweighting.problem import LLMReweighting
from tests.bilevel_llm.tiny import SIZES, make_tokenizer

FAMILIES: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4),
    "qwen3-moe": lambda: Qwen3MoeConfig(**SIZES, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24),
}


class Counted(TorchDispatchMode):
    """Notes the types of the numbers that are counted in histograms."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.types: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.histc.default:
            self.types.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_on_an_accelerator_tokens_are_counted_in_integers_and_nothing_is_read(family: str) -> None:
    """CUDA counts floating-point numbers in an order of its own, which torch refuses in deterministic mode; integers are exact.

    The meta device takes the way of an accelerator, and refuses to be read.
    """
    model = LanguageModel(AutoModelForCausalLM.from_config(FAMILIES[family]())).to("meta", torch.bfloat16)
    ids, positions = torch.arange(40).view(2, 20), torch.tensor([3, 8, 25])
    with Counted() as counted:
        for packing in ((), (Packing.of(ids, positions).to(torch.device("meta")),)):
            model(ids.to("meta"), positions.to("meta"), *packing).float().sum().backward()
    assert counted.types == {torch.int32}


def test_a_deterministic_run_is_the_same_every_time_and_for_any_micro_batches(
    problem: Callable[..., LLMReweighting], tmp_path: Path
) -> None:
    """Bit for bit; for other micro-batches to the rounding of float32, in which losses of 5 nats are known to 1e-6."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(FAMILIES["mixtral"]()).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)

    def weights(micro_batch_size: int | None) -> dict[str, float]:
        backend = TorchBackend(device="cpu", micro_batch_size=micro_batch_size)
        solver = ScaleBiO(warmup=0, lr_z=1e-3)
        ended = fit(problem(model=str(tmp_path)), solver, backend, steps=1, active=LISA(blocks=1)).history[-1]
        return dict(ended.upper)

    first = weights(None)
    assert weights(None) == first
    assert weights(4) == pytest.approx(first, abs=1e-6)
