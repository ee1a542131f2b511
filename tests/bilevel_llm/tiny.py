"""Tiny random models of the families people use, with a tokenizer made on the spot; small data and short runs to go with them."""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from bilevel import Descent, fit
from bilevel.active import Active
from bilevel_backends.torch_backend import TorchBackend
from bilevel_llm.finetuning.problem import FineTuning

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


WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "hat", "red", "blue", "and", "then", "saw"]


def sentences(seed: int, rows: int, words: Sequence[str] = WORDS) -> list[dict[str, str]]:
    draw = random.Random(seed)
    text = [[draw.choice(words) for _ in range(draw.randint(2, 9))] for _ in range(rows)]
    return [{"instruction": " ".join(t[:2]), "input": "", "output": " ".join(t)} for t in text]


def write_rows(file: Path, rows: Sequence[Any]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


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


class Keeping(TorchBackend):
    """Remembers the modules it was given, so that a test can look at them after the run."""

    def place(self, name: str, *args: Any, **kwargs: Any) -> Any:
        variable = super().place(name, *args, **kwargs)
        self.__dict__.setdefault("modules", {})[name] = variable.module
        return variable


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
