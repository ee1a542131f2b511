from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, OPTConfig

from bilevel.errors import InputError
from bilevel_llm.finetuning.problem import FineTuning
from bilevel_llm.model.limits import learned_positions
from tests.bilevel_llm.tiny import FAMILIES, write_rows

LONG = [{"text": "x" * 200}, {"text": "y" * 150}]


@pytest.mark.parametrize(("family", "fits"), [("gpt2", False), ("llama", True)])
def test_rows_longer_than_the_learned_positions_are_refused_before_the_first_step(
    tuning: Callable[..., FineTuning], tmp_path: Path, family: str, fits: bool
) -> None:
    file = write_rows(tmp_path / "long.jsonl", LONG)
    problem = tuning(family, data=file, max_length=180, batch_size=2)
    if fits:  # it computes positions
        problem.prepare()
        return
    with pytest.raises(InputError, match=r"long\.jsonl:1 .*has 180 tokens, .* learned 128 positions; set max_length to 128"):
        problem.prepare()


def test_tokens_beyond_the_embedding_are_refused_before_the_first_step(
    tuning: Callable[..., FineTuning], model_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    config = AutoConfig.from_pretrained(model_directory("llama"))
    config.vocab_size, config.pad_token_id, config.bos_token_id, config.eos_token_id = 150, None, None, None
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "small")
    for file in model_directory("llama").glob("*token*"):
        (tmp_path / "small" / file.name).write_bytes(file.read_bytes())
    problem = tuning(model=str(tmp_path / "small"))
    with pytest.raises(InputError, match=r"clean\.jsonl:1 .*writes token 2\d\d, and the model's embedding has 150 tokens"):
        problem.prepare()


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (FAMILIES["gpt2"](), 128), (FAMILIES["llama"](), None), (FAMILIES["gpt-neox"](), None),
        (OPTConfig(vocab_size=9, hidden_size=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=1, max_position_embeddings=32, word_embed_proj_dim=8), 32),
    ],
)  # fmt: skip
def test_learned_positions_are_told_from_computed_ones(config: Any, positions: int | None) -> None:
    assert learned_positions(AutoModelForCausalLM.from_config(config)) == positions
