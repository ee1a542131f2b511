"""A model that computes every distinct token once has the losses and gradients of one that computes padded rows."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from bilevel import LISA, Active, AdamW, All, Shard
from bilevel_backends.torch_backend import TorchBackend
from bilevel_llm.data.packing import Packing
from bilevel_llm.evaluation.scores import score
from bilevel_llm.finetuning.problem import FineTuning
from bilevel_llm.model.language_model import LanguageModel
from bilevel_llm.model.lora import LoRA
from bilevel_llm.model.suitability import Probe, can_be_packed, examine, probe_packed
from bilevel_llm.model.token_losses import token_losses
from bilevel_llm.reweighting.problem import LLMReweighting
from tests.bilevel_llm.model.test_suitability import CAUSAL
from tests.bilevel_llm.tiny import make_tokenizer

PACKED = ["llama", "llama-tied", "qwen2", "mistral", "gpt-neox"]
"""Families that every version of transformers lets pack. The window of mistral is shorter than the rows here."""
PADDED = ["roberta, as a decoder", "mamba", "mamba2", "falcon", "bloom"]


def model(family: str, dtype: torch.dtype = torch.float64) -> LanguageModel:
    torch.manual_seed(0)
    module = LanguageModel(AutoModelForCausalLM.from_config(CAUSAL[family]()).to(dtype))
    for part in module.modules():
        if dtype == torch.float64 and type(part).__name__.endswith("RMSNorm"):  # which would round to float32
            part.forward = partial(F.rms_norm, normalized_shape=part.weight.shape, weight=part.weight, eps=1e-6)
    return module


def rows() -> tuple[Tensor, Tensor, Tensor]:
    """Ids, positions and weights. The rows begin alike, one is the beginning of another, and what they share has labels."""
    ids = torch.randint(0, 250, (4, 30), generator=torch.Generator().manual_seed(1))
    ids[1, :12] = ids[2, :12] = ids[0, :12]
    ids[2, 12:20] = ids[0, 12:20]
    lengths = [30, 25, 20, 9]
    positions = torch.cat([row * 30 + torch.arange(3, length - 1) for row, length in enumerate(lengths)])
    return ids, positions, torch.linspace(0.5, 1.5, len(positions), dtype=torch.float64)


def gradients_of_rows(
    module: LanguageModel, parameters: list[torch.nn.Parameter], *, packed: bool
) -> tuple[Tensor, list[Tensor]]:
    """The losses of the rows above, and their gradients."""
    ids, positions, weights = rows()
    packing = (Packing.of(ids, positions),) if packed else ()
    losses = token_losses(module(ids, positions, *packing), ids.flatten()[positions + 1])
    return losses.detach(), list(torch.autograd.grad((weights * losses).sum(), parameters))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt-neox"])
def test_attention_is_given_no_mask_so_that_torch_takes_its_fastest_kernel(
    family: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flash kernel of torch knows causal attention, and takes no mask."""
    asked: list[tuple[Any, Any]] = []

    def attention(*args: Any, original: Callable[..., Tensor] = F.scaled_dot_product_attention, **settings: Any) -> Tensor:
        asked.append((settings.get("attn_mask"), settings.get("is_causal")))
        return original(*args, **settings)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    module = model(family)
    gradients_of_rows(module, list(module.parameters()), packed=packed)
    assert asked == [(None, True)] * module.model.config.num_hidden_layers


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["float64", "float32"])
@pytest.mark.parametrize("family", PACKED)
def test_losses_and_gradients_are_those_of_padded_rows(family: str, dtype: torch.dtype, tolerance: float) -> None:
    """Relative to the largest entry: what differs is the order of summation."""
    module = model(family, dtype)
    ids, positions, _ = rows()
    assert len(Packing.of(ids, positions).row) == 29 + 12 + 8  # the third row is all in the first
    parameters = list(module.parameters())
    (padded, wanted), (packed, gradients) = (
        gradients_of_rows(module, parameters, packed=packed) for packed in (False, True)
    )
    assert (packed - padded).abs().max() <= tolerance * padded.abs().max()
    for gradient, other in zip(gradients, wanted, strict=True):
        assert (gradient - other).abs().max() <= tolerance * other.abs().max()


def problem_gradients(
    problem: LLMReweighting, packed: bool, active: Active | None = None, **settings: Any
) -> dict[str, Tensor]:
    """Gradients of x and y in the passes of a step."""
    backend = TorchBackend(dtype="float64", device="cpu", **settings)
    backend.start(seed=3)
    problem.packed = packed
    x = backend.place("x", problem.upper, AdamW(), sharded=False)
    y = backend.place("y", problem.lower, AdamW(), sharded=True, blocks=problem.blocks)
    backend.activate(y, (active or All()).at(0, y.blocks, seed=3))
    lower, upper = problem.lower_batch(5, backend.shard), problem.upper_batch(5, backend.shard)
    assert all((batch.packing is not None) == packed for batch in [*lower, *upper])
    backend.backward(lambda b: problem.lower_loss(x, y, b), lower, wrt={x: 10.0, y: 1.0})
    backend.backward(lambda b: problem.upper_loss(x, y, b), upper, wrt={x: 1.0, y: 0.1})
    found = {f"x.{name}": g for name, g in x.gradients.items()} | {f"y.{name}": g for name, g in y.gradients.items()}
    backend.close()
    return found


@pytest.mark.parametrize(
    ("active", "settings"),
    [
        (All(), {}),
        (All(), {"micro_batch_size": 3}),
        (All(), {"activation_checkpointing": True}),
        (LISA(blocks=1), {}),
        (LISA(blocks=1), {"micro_batch_size": 3, "activation_checkpointing": True}),
    ],
    ids=str,
)
def test_the_gradients_of_a_step_are_those_of_padded_rows(
    problem: Callable[..., LLMReweighting], active: Active, settings: dict[str, Any]
) -> None:
    """In float64, of the weights of sources too. This family's norms do not round to float32."""
    padded = problem_gradients(problem("gpt-neox"), packed=False, active=active)
    packed = problem_gradients(problem("gpt-neox"), packed=True, active=active, **settings)
    assert packed.keys() == padded.keys()
    for name, gradient in packed.items():
        assert (gradient - padded[name]).abs().max() <= 1e-12 * padded[name].abs().max(), name


def test_adapters_are_trained_on_packed_rows(tuning: Callable[..., FineTuning]) -> None:
    """With the gradients of padded rows, once the adapters have left their start, at which half of them are zero."""
    problem = tuning("gpt-neox", lora=LoRA(rank=2))
    module = problem.lower().double()
    assert isinstance(module, LanguageModel)
    assert examine(module, make_tokenizer())
    adapters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for adapter in adapters:
        torch.nn.init.normal_(adapter, std=0.1, generator=torch.Generator().manual_seed(0))
    padded, packed = (gradients_of_rows(module, adapters, packed=packed)[1] for packed in (False, True))
    for gradient, other in zip(packed, padded, strict=True):
        assert other.abs().max() > 0
        assert (gradient - other).abs().max() <= 1e-12 * other.abs().max()


def test_scores_are_those_of_padded_rows(problem: Callable[..., LLMReweighting]) -> None:
    p = problem("gpt-neox")
    module, table = p.lower().double(), next(iter(p.source_tables.values()))
    padded, packed = score(module, table), score(module, table, packed=True)
    torch.testing.assert_close(packed.losses, padded.losses, rtol=1e-12, atol=0)
    assert (packed.correct == padded.correct).all()


@pytest.mark.parametrize("family", PACKED)
def test_the_probe_lets_rows_be_packed(family: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert examine(model(family, dtype), make_tokenizer())


@pytest.mark.parametrize("family", PADDED)
def test_a_model_that_cannot_take_packed_rows_is_given_padded_ones_and_the_log_says_so(
    family: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="bilevel.llm"):
        assert not examine(model(family, torch.float32), make_tokenizer())
    said = [record.getMessage() for record in caplog.records if record.name == "bilevel.llm"]
    assert said == ["rows are padded: this model's layers, or its attention, cannot take packed rows"]


@pytest.mark.parametrize("part", ["row", "place"])
def test_the_probe_finds_rows_or_positions_that_are_ignored(part: str) -> None:
    """Tokens that see no rows, or are all taken for the first of their row."""
    module = model("llama", torch.float32)

    def spoil(_: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if "packed_rows" in kwargs:
            kwargs = {key: value for key, value in kwargs.items() if not (part == "row" and key == "packed_rows")}
            if part == "place":
                kwargs["position_ids"] = kwargs["position_ids"] * 0
        return args, kwargs

    module.model.register_forward_pre_hook(spoil, with_kwargs=True)
    with torch.no_grad():
        found = probe_packed(module, Probe.of(make_tokenizer()))
    assert not can_be_packed({"packed": float(found["packed"])})


def test_a_run_packs_the_rows_of_a_model_that_can_take_them(problem: Callable[..., LLMReweighting]) -> None:
    p = problem()
    module = p.lower()
    with torch.no_grad():
        p.examine(lambda what, batch: {name: float(value) for name, value in what(module, batch).items()})
    assert p.packed
    assert all(batch.packing is not None for batch in p.lower_batch(0, Shard(0)))
