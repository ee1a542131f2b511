"""The bundled model for real: run by `make test-slow`."""

from pathlib import Path

import pytest
import torch

from bilevel_llm.model.files import _bundled_gguf, find_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # what loading GGUF warns about is not ours
]


def test_the_converted_model_is_the_one_in_the_gguf_file() -> None:
    from transformers import AutoModelForCausalLM

    file = _bundled_gguf("smollm2-135m")
    ids = torch.arange(50, 90)[None]
    with torch.no_grad():
        original = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)(ids).logits
        converted = find_model("smollm2-135m").load_model()(ids).logits
    assert torch.equal(original, converted)


def test_the_tokenizer_keeps_its_chat_template() -> None:
    tokenizer = find_model("smollm2-135m").load_tokenizer()
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_a_second_look_does_not_convert_again(monkeypatch: pytest.MonkeyPatch) -> None:
    first = find_model("smollm2-135m")
    monkeypatch.setattr("bilevel_llm.model.files._write_plain", lambda *a: pytest.fail("converted again"))
    assert find_model("smollm2-135m").path == first.path
    assert Path(first.path, "config.json").is_file()
