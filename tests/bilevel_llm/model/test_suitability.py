"""Models that see what they must not are found; those that only round, or choose experts, are not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from bilevel import Descent, InputError, fit
from bilevel_backends.torch_backend import TorchBackend
from bilevel_llm.evaluation.scores import evaluate
from bilevel_llm.finetuning.problem import FineTuning
from bilevel_llm.model.language_model import LanguageModel
from bilevel_llm.model.suitability import Probe, examine
from tests.bilevel_llm.tiny import FAMILIES, NEOX_SIZES, SIZES, make_tokenizer

MAMBA: dict[str, Any] = {"vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
ROPE: dict[str, Any] = {"factor": 4.0, "original_max_position_embeddings": 32}


def config(name: str, **settings: Any) -> Any:
    return getattr(transformers, f"{name}Config")(**settings)


CAUSAL: dict[str, Callable[[], Any]] = {
    **FAMILIES,
    "bert, as a decoder": lambda: config("Bert", **NEOX_SIZES, is_decoder=True),
    "roberta, as a decoder": lambda: config("Roberta", **{**NEOX_SIZES, "pad_token_id": 1}, is_decoder=True),
    "experts": lambda: config("Mixtral", **SIZES, num_local_experts=4),
    "shared experts": lambda: config("Qwen2Moe", **SIZES, num_experts=4, moe_intermediate_size=16),
    "mamba": lambda: config("Mamba", **MAMBA),
    "mamba2": lambda: config("Mamba2", **MAMBA, num_heads=8, head_dim=8, n_groups=1, chunk_size=8),
    "falcon": lambda: config("Falcon", vocab_size=264, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "bloom": lambda: config("Bloom", vocab_size=264, hidden_size=32, n_layer=2, n_head=4),
    "opt": lambda: config("OPT", vocab_size=264, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
                          max_position_embeddings=128, word_embed_proj_dim=32),
    "gemma3": lambda: config("Gemma3Text", **SIZES, head_dim=8),
    "yarn": lambda: config("Llama", **SIZES, rope_scaling={"rope_type": "yarn", **ROPE}),
    "llama3": lambda: config("Llama", **SIZES, rope_scaling={"rope_type": "llama3", **ROPE, "low_freq_factor": 1.0,
                                                            "high_freq_factor": 4.0}),
}  # fmt: skip
SEEING: dict[str, Callable[[], Any]] = {
    "bert": lambda: config("Bert", **NEOX_SIZES),
    "roberta": lambda: config("Roberta", **{**NEOX_SIZES, "pad_token_id": 1}),
    "electra": lambda: config("Electra", **NEOX_SIZES),
    "xlnet": lambda: config("XLNet", vocab_size=264, d_model=32, n_layer=2, n_head=4, d_inner=48),
    "gemma3, bidirectional": lambda: config("Gemma3Text", **SIZES, head_dim=8, use_bidirectional_attention=True),
}


def look(make: Callable[[], Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = LanguageModel(AutoModelForCausalLM.from_config(make()).to(dtype))
    examine(model, make_tokenizer())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", CAUSAL)
def test_causal_models_raise_no_alarm(family: str, dtype: torch.dtype) -> None:
    look(CAUSAL[family], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", SEEING)
def test_models_that_see_their_targets_are_refused(family: str, dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match="the model is not causal"):
        look(SEEING[family], dtype)


class Spoiled(nn.Module):
    """A language model with something that it must not have."""

    def __init__(self, spoil: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.model = AutoModelForCausalLM.from_config(FAMILIES["llama"]()).eval()
        self.spoil = spoil
        self.get_input_embeddings = self.model.get_input_embeddings

    def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.spoil(self.model(ids).logits).flatten(0, 1)[positions]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda logits: logits + 0.1 * logits.roll(-1, 1), "the model is not causal"),
        (lambda logits: logits + 0.1 * logits.mean((0, 1)), "the model is not causal"),
        (lambda logits: logits + 0.1 * logits[-1, 0], "the model mixes the rows of a batch"),
        (lambda logits: logits * (1 + 0.01 * logits.shape[1]), "when a row is padded to the length of a longer one"),
        (lambda logits: logits * float("nan"), "the model's logits are not finite"),
    ],
)
def test_what_a_prediction_must_not_depend_on_is_named(spoil: Callable[[torch.Tensor], torch.Tensor], words: str) -> None:
    torch.manual_seed(0)
    model = Spoiled(spoil)
    with pytest.raises(InputError, match=words):
        examine(model, make_tokenizer())


def test_the_probe_has_no_special_tokens_and_is_always_the_same() -> None:
    tokenizer = make_tokenizer()
    first, second = Probe.of(tokenizer), Probe.of(tokenizer)
    assert torch.equal(first.base, second.base)
    assert not set(first.base.flatten().tolist()) & set(tokenizer.all_special_ids)


# ------------------------------------------------------------------------------------------------------------------- in runs


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[Any], str]:
    def save(settings: Any) -> str:
        AutoModelForCausalLM.from_config(settings).save_pretrained(tmp_path / "model")
        make_tokenizer().save_pretrained(tmp_path / "model")
        return str(tmp_path / "model")

    return save


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
UNSUITABLE: dict[str, tuple[Callable[[], Any], str]] = {
    "bert": (SEEING["bert"], "the model is not causal"),
    "dynamic": (lambda: config("Llama", **{**SIZES, "max_position_embeddings": 20}, rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
                r"above 20 the rotary positions of this model \(dynamic\) change .* set max_length to 20"),
    "longrope": (lambda: config("Phi3", **SIZES, original_max_position_embeddings=30, rope_scaling=LONGROPE),
                 r"above 30 the rotary positions of this model \(longrope\)"),
    "learned positions": (lambda: config("GPT2", vocab_size=264, n_embd=32, n_layer=1, n_head=4, n_positions=16),
                          "the model has learned 16 positions; set max_length to 16"),
    "learned positions, with an offset": (lambda: config("OPT", vocab_size=264, hidden_size=32, ffn_dim=48, num_hidden_layers=1,
                                                         num_attention_heads=4, max_position_embeddings=16, word_embed_proj_dim=32),
                                          "the model has learned 16 positions"),
    "another tokenizer": (lambda: config("Llama", **{**SIZES, "vocab_size": 120, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}),
                          r"writes token \d+, and the model's embedding has 120 tokens"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNSUITABLE)
def test_a_model_that_does_not_suit_is_refused_before_anything_is_written(
    case: str, saved: Callable[[Any], str], tuning: Callable[..., FineTuning], data: dict[str, str], tmp_path: Path
) -> None:
    make, words = UNSUITABLE[case]
    model = saved(make())
    with pytest.raises(InputError, match=words):
        fit(tuning(model=model), Descent(), TorchBackend(device="cpu"), steps=1, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match=words):
        evaluate(model, [data["target"]], device="cpu")


def test_rope_that_follows_the_batch_is_taken_where_it_cannot_change(
    saved: Callable[[Any], str], tuning: Callable[..., FineTuning]
) -> None:
    """Rows of up to 16 tokens: a short row alone and beside the longest has the same logits."""
    problem = tuning(model=saved(UNSUITABLE["longrope"][0]()), max_length=30)
    fit(problem, Descent(), TorchBackend(device="cpu"), steps=1)
    module = problem.lower()
    row = torch.tensor([AutoTokenizer.from_pretrained(problem.model)("the cat sat")["input_ids"]])
    beside = torch.zeros(2, 30, dtype=torch.int64)
    beside[0, : row.shape[1]] = row[0]
    places = torch.arange(row.shape[1])
    torch.testing.assert_close(module(beside, places), module(row, places), rtol=0, atol=1e-5)
