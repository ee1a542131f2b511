"""Tiny random models of the families people use, with a tokenizer made on the spot; and small data to go with them."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from bilevel_llm.reweighting.problem import LLMReweighting, Source, ValidationSet

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES: dict[str, Any] = {
    "vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258,
}  # fmt: skip
NEOX_SIZES = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=False, attention_dropout=0.5),
    "llama-tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "gemma2": lambda: Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=5.0, sliding_window=16),
    "qwen2": lambda: Qwen2Config(**SIZES, tie_word_embeddings=False),
    "mistral": lambda: MistralConfig(**SIZES, head_dim=8, sliding_window=16),
    "gpt2": lambda: GPT2Config(vocab_size=264, n_embd=32, n_layer=3, n_head=4, n_positions=128, bos_token_id=256, eos_token_id=257),
    "gpt-neox": lambda: GPTNeoXConfig(**NEOX_SIZES),
}  # fmt: skip


def make_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Every byte is a token; the special tokens follow."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of a family -> a saved model of it."""
    made: dict[str, Path] = {}

    def directory(family: str = "llama") -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("models") / family
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(FAMILIES[family]()).save_pretrained(made[family])
            make_tokenizer().save_pretrained(made[family])
        return made[family]

    return directory


WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "hat", "red", "blue", "and", "then", "saw"]


def sentences(seed: int, rows: int, words: Sequence[str] = WORDS) -> list[dict[str, str]]:
    draw = random.Random(seed)
    text = [[draw.choice(words) for _ in range(draw.randint(2, 9))] for _ in range(rows)]
    return [{"instruction": " ".join(t[:2]), "input": "", "output": " ".join(t)} for t in text]


def write_rows(file: Path, rows: Sequence[Any]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    where = tmp_path_factory.mktemp("data")
    return {
        "clean": write_rows(where / "clean.jsonl", sentences(1, 40)),
        "other": write_rows(where / "other.jsonl", sentences(2, 30, [word[::-1] for word in WORDS])),
        "noise": write_rows(where / "noise.jsonl", sentences(3, 24, [chr(c) * 3 for c in range(65, 91)])),
        "target": write_rows(where / "target.jsonl", sentences(4, 30)),
    }


@pytest.fixture
def problem(model_directory: Callable[[str], Path], data: dict[str, str]) -> Callable[..., LLMReweighting]:
    def make(family: str = "llama", **settings: Any) -> LLMReweighting:
        fields: dict[str, Any] = {
            "model": str(model_directory(family)),
            "sources": [Source(name, data[name]) for name in ("clean", "other", "noise")],
            "validation": [ValidationSet(data["target"])],
            "max_length": 64,
            "batch_size": 10,
        }
        return LLMReweighting(**{**fields, **settings})

    return make
