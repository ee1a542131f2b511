"""Random rows: they are learned word by word, or refused in one line, and never end in a traceback."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from bilevel.errors import InputError
from bilevel_llm.data.chat import Encoder
from bilevel_llm.data.files import pass_over
from bilevel_llm.data.reading import each_row
from bilevel_llm.data.rows import Row, Turn
from tests.bilevel_llm.tiny import CHATML, make_tokenizer

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]\n\n{{ m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
)
IGNORES = CHATML[: CHATML.index("{% if add_generation_prompt %}")]
PIECES = [
    "a", "Yes", " ", "\n", "\t", "é", "😀", "👩‍👩‍👧", "\u2028", "\u00a0", "\u200b", "\x00", "\x1b[31m", "#", "{{", "{% raw %}", "}}", "assistant",
    "<|im_start|>", "<|im_end|>", "<eos>", "<bos>", "[assistant]", "</think>", "<think>", "### Response:\n", "0", "\\", '"', "e\u0301", "\ufeff",
]  # fmt: skip


def text(draw: random.Random) -> str:
    return "".join(draw.choices(PIECES, k=draw.randint(0, 8)))


@pytest.mark.parametrize(
    "template", [None, CHATML, LLAMA3, MARKED, IGNORES], ids=["plain", "chatml", "trimmed", "marked", "ignores"]
)
def test_the_labelled_tokens_are_the_answers_and_the_ends_of_their_turns(template: str | None) -> None:
    draw = random.Random(0)
    tokenizer: PreTrainedTokenizerFast = make_tokenizer(template)
    end = "<eos>" if template is None else "<|im_end|>"
    encoder = Encoder(tokenizer)
    for number in range(150):
        turns = [Turn("system", text(draw))] if draw.random() < 0.3 else []
        for _ in range(draw.randint(1, 3)):
            turns += [Turn("user", text(draw)), Turn("assistant", text(draw), masked=draw.random() < 0.2)]
        turns[-1] = Turn("assistant", text(draw))
        if draw.random() < 0.1:
            turns = turns[1 + (turns[0].role == "system") :]  # the assistant begins
        (encoded,) = encoder.encode([Row(tuple(turns), f"a:{number}")])
        found = tokenizer.decode(
            [i for i, label in zip(encoded.ids, encoded.labels, strict=True) if label], clean_up_tokenization_spaces=False
        )
        answers = [turn.text for turn in turns if turn.learned]
        if template == LLAMA3:  # it trims
            answers = [answer.strip() for answer in answers]
        assert found == "".join(answer + end for answer in answers)
        assert encoded.notes == ()


def value(draw: random.Random, depth: int = 0) -> Any:
    """Anything that JSON can hold, and what data sets are made of more often than not."""
    kinds = ["text", "number", "null", "true", "list", "object", "turns", "turn", "role"]
    match draw.choice(kinds[:4] if depth > 2 else kinds):
        case "text":
            return text(draw)
        case "number":
            return draw.choice([0, 1, -1, 0.5, 10**400, float("nan"), float("inf")])
        case "null":
            return None
        case "true":
            return draw.choice([True, False])
        case "list":
            return [value(draw, depth + 1) for _ in range(draw.randint(0, 3))]
        case "object":
            return {draw.choice(NAMES): value(draw, depth + 1) for _ in range(draw.randint(0, 3))}
        case "turn":
            return {
                draw.choice(["role", "from"]): draw.choice(ROLES),
                draw.choice(["content", "value"]): value(draw, depth + 1),
            }
        case "turns":
            return [
                {"role": draw.choice(ROLES), "content": text(draw)}
                | ({draw.choice(NAMES): value(draw, 2)} if draw.random() < 0.3 else {})
                for _ in range(draw.randint(0, 4))
            ]
    return draw.choice(ROLES)


NAMES = [
    "messages", "conversations", "items", "instruction", "input", "output", "prompt", "completion", "text", "system", "history",
    "role", "content", "from", "value", "type", "weight", "train", "mask", "tool_calls", "tools", "name", "reasoning_content", "thinking",
    "label", "rejected", "images", "_bilevel", "format", "",
]  # fmt: skip
ROLES = ["user", "assistant", "system", "human", "gpt", "tool", "developer", "observation", "", "Assistant"]
FORMATS = {
    "messages": ["messages"], "sharegpt": ["conversations"], "alpaca": ["instruction", "output"],
    "prompt_completion": ["prompt", "completion"], "text": ["text"], None: [],
}  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
def test_random_rows_are_read_or_refused_in_one_line(tmp_path: Path, format: str | None) -> None:
    draw = random.Random(1)
    encoder = Encoder(make_tokenizer(), max_length=64)
    file, learned, said = tmp_path / "a.jsonl", 0, set()
    for _ in range(200):
        row = {name: value(draw) for name in [*FORMATS[format], *draw.choices(NAMES, k=draw.randint(0, 3))]}
        if draw.random() < 0.3 and "messages" in row:
            row["messages"] = [{"role": "user", "content": text(draw)}, {"role": "assistant", "content": value(draw)}]
        written = json.dumps(row if draw.random() < 0.95 else value(draw))
        file.write_bytes((written[: draw.randint(0, len(written))] if draw.random() < 0.05 else written).encode() + b"\n")
        try:
            encoded = encoder.encode(list(each_row(file, format)))
        except InputError as error:
            message = str(error)
            assert message.startswith(str(file)), message
            assert len(message) < 1000, message
            said.add(message.partition(": ")[2][:20])
        else:
            learned += len(encoded)
            assert all(any(one.labels) or one.cut or len(one.ids) < 2 for one in encoded)
    assert learned > 0
    assert len(said) > 4


def test_random_bytes_are_no_rows(tmp_path: Path) -> None:
    draw = random.Random(2)
    for name in ("a.jsonl", "a.json", "a.csv", "a.jsonl.gz", "a.json.zst", "a.parquet", "a.arrow"):
        for _ in range(20):
            content = draw.choice([b"", b"[", b"{", b"\xef\xbb\xbf", b"PAR1", b"ARROW1\0\0"]) + draw.randbytes(
                draw.randint(0, 40)
            )
            (tmp_path / name).write_bytes(content)
            try:
                list(each_row(tmp_path / name, on_bad=pass_over))
            except InputError as error:
                assert str(error).startswith(str(tmp_path / name))  # noqa: PT017 - either outcome will do
