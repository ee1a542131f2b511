"""Data whose best mix is known: rows of Markov chains as text, and a small language model with random weights.

Every dialect is a chain over sixteen words. The target's rows are half of dialect a, three tenths of b and a fifth of c, so
that with enough training the best weights of the pure sources are these shares; what other sources teach is of no use. The
other sources are a dialect that the target does not have, random words, and, up to twenty, more of both.

Usage: python dialects.py DIRECTORY
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bilevel_problems.dialects import Dialects

WORDS = ["the", "a", "old", "new", "red", "cat", "dog", "bird", "sees", "likes", "finds", "and", "or", "here", "now", "too"]
TARGET = {"a": 0.5, "b": 0.3, "c": 0.2}
OTHERS = 6  # dialects that the target does not have
ROWS, LARGE, HELD_OUT = 4000, 40_000, 1500
SPECIAL = ["<bos>", "<eos>", "<pad>", "<unk>"]


def main(directory: Path) -> None:
    """Write a JSONL file for each source, the target's validation and test files, and the model."""
    directory.mkdir(parents=True, exist_ok=True)
    shares = [*TARGET.values(), *[0.0] * OTHERS]
    dialects = Dialects(target=shares, mixes=[shares], noise=1, vocabulary=len(WORDS))
    pure = {name: _only(i, len(shares)) for i, name in enumerate([*TARGET, *(f"other{j}" for j in range(1, OTHERS + 1))])}
    noise = _only(len(shares), len(shares))
    sources = {**pure, "noise": noise} | {f"noise{j}": noise for j in range(2, 13)}
    for number, (name, mix) in enumerate(sources.items()):
        write(directory / f"{name}.jsonl", dialects.draw(mix, ROWS, 10, number).tolist())
    write(directory / "noise-large.jsonl", dialects.draw(noise, LARGE, 11, 0).tolist())
    write(directory / "b-large.jsonl", dialects.draw(pure["b"], LARGE, 11, 1).tolist())
    for number, name in enumerate(("validation", "test")):
        write(directory / f"{name}.jsonl", dialects.draw([*shares, 0.0], HELD_OUT, 12, number).tolist())
    model(directory / "model")


def write(file: Path, rows: Sequence[Sequence[int]]) -> None:
    """One row of text a line."""
    lines = [json.dumps({"text": " ".join(WORDS[word] for word in row)}) + "\n" for row in rows]
    file.write_text("".join(lines), encoding="utf-8")


def model(directory: Path) -> None:
    """A Llama of four layers of width 64 that knows the words and nothing else."""
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _only(place: int, others: int) -> list[float]:
    return [float(i == place) for i in range(others + 1)]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} DIRECTORY")
    main(Path(sys.argv[1]))
