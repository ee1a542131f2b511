"""Recipes with random models of real widths, so that nothing has to be downloaded.

Usage: python benchmarks/random_models.py DIRECTORY SIZE    (writes the model, its data and DIRECTORY/recipe.yaml)
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROWS = 64
"""Rows of each file: of as many sources, a batch of 64 needs half of them."""

RECIPE: dict[str, Any] = {
    "solver": {"name": "scalebio", "penalty": 10, "lr_x": 0.05, "lr_z": 1e-5, "warmup": 2},
    "backend": {"name": "torch", "dtype": "bfloat16", "micro_batch_size": 4, "activation_checkpointing": True},
    "active": {"name": "lisa"},
}


@dataclass(frozen=True)
class Size:
    """The shape of a model. length: of its rows. biased: whether its projections have a bias, as Qwen2's have."""

    hidden: int
    layers: int
    inner: int
    heads: int
    shared: int
    vocabulary: int
    length: int = 1024
    biased: bool = False


SIZES = {
    "tiny": Size(64, 4, 128, 4, 2, 300, length=32),
    "1b": Size(2048, 22, 5632, 16, 4, 32000),
    "8b-width": Size(4096, 8, 14336, 32, 8, 128256),  # 8 of 32 layers
    "32b-width": Size(5120, 6, 27648, 40, 8, 152064, biased=True),  # 6 of 64 layers
}


def write(directory: Path, size: str) -> Path:
    """Write a model, two sources and a validation set of full rows. Returns the recipe."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

    shape = SIZES[size]
    directory.mkdir(parents=True, exist_ok=True)
    raw = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=raw).save_pretrained(directory)
    kind = Qwen2Config if shape.biased else LlamaConfig
    config = kind(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.inner,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.shared,
        vocab_size=shape.vocabulary,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    for name in ("a", "b", "target"):
        rows = [{"text": f"{i}{name} " * shape.length} for i in range(ROWS)]
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return write_recipe(directory, shape.length)


def write_recipe(directory: Path, length: int) -> Path:
    """Write the recipe of the model and the data in a directory."""
    problem = {
        "name": "llm-reweighting",
        "model": str(directory),
        "max_length": length,
        "batch_size": 16,
        "sources": [{"name": name, "path": str(directory / f"{name}.jsonl")} for name in ("a", "b")],
        "validation": [{"path": str(directory / "target.jsonl")}],
    }
    recipe = directory / "recipe.yaml"
    # JSON is YAML
    recipe.write_text(json.dumps({"problem": problem, **RECIPE, "run": {"steps": 10, "output": str(directory / "run")}}))
    return recipe


def main() -> None:
    """Write one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("size", choices=SIZES)
    options = parser.parse_args()
    print(write(options.directory, options.size))


if __name__ == "__main__":
    main()
