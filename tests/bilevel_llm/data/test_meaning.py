"""What a row says is learned, or the row is refused: no field that changes its meaning to a common trainer is dropped."""

import json
from pathlib import Path
from typing import Any

import pytest

from bilevel.errors import InputError
from bilevel_llm.data.reading import read_rows
from bilevel_llm.data.rows import Turn
from tests.bilevel_llm.tiny import write_jsonl

Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
ASKED = (Turn("user", "q"), Turn("assistant", "a"))
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
ALPACA = {"instruction": "q", "output": "a"}
TOLD = (Turn("system", "s"), *ASKED)


def turns(path: Path, row: dict[str, Any], format: str | None = None) -> tuple[Turn, ...]:
    (found,) = read_rows([str(write_jsonl(path / "a.jsonl", [row]))], format=format)
    return found.turns


def answer(**fields: Any) -> dict[str, Any]:
    return {"messages": [Q, {**A, **fields}]}


READ = {
    "reasoning_content": (answer(reasoning_content="r"), (ASKED[0], Turn("assistant", "a", reasoning="r"))),
    "reasoning": (answer(reasoning="r"), (ASKED[0], Turn("assistant", "a", reasoning="r"))),
    "thinking": (answer(thinking="r", reasoning=None), (ASKED[0], Turn("assistant", "a", reasoning="r"))),
    "system of sharegpt": ({"conversations": SHAREGPT, "system": "s"}, TOLD),
    "system of messages": ({"messages": [Q, A], "system": "s"}, TOLD),
    "the same system twice": ({"messages": [{"role": "system", "content": "s"}, Q, A], "system": "s"}, TOLD),
    "no system": ({"conversations": SHAREGPT, "system": ""}, ASKED),
    "system of alpaca": ({**ALPACA, "system": "s"}, TOLD),
    "system of prompts": ({"prompt": [Q], "completion": [A], "system": "s"}, TOLD),
    "history": ({**ALPACA, "history": [["q", "a"]], "system": "s"}, (*TOLD, *ASKED)),
    "no history": ({**ALPACA, "history": None}, ASKED),
    "developer": ({"messages": [{"role": "developer", "content": "s"}, Q, A]}, TOLD),
    "parts": (
        answer(content=[{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]),
        (ASKED[0], Turn("assistant", "ab")),
    ),
    "JSON": ({"conversations": json.dumps(SHAREGPT)}, ASKED),
    "empty fields": (
        {**answer(tool_calls=[], name=None, images=None), "tools": "[]", "images": [], "functions": None},
        ASKED,
    ),
    "a good verdict": ({"prompt": "q", "completion": "a", "label": True}, (Turn("prompt", "q"), Turn("completion", "a"))),
    "a class": ({"text": "t", "label": 3}, (Turn("text", "t"),)),
    "a prompt with an answer": (
        {"prompt": [Q, A, Q], "completion": [A]},
        (Turn("user", "q"), Turn("assistant", "a", masked=True), *ASKED),
    ),
}


@pytest.mark.parametrize(("row", "expected"), READ.values(), ids=READ.keys())
def test_what_a_row_says_is_read(tmp_path: Path, row: dict[str, Any], expected: tuple[Turn, ...]) -> None:
    assert turns(tmp_path, row) == expected


@pytest.mark.parametrize(
    "flag",
    [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}, {"loss": 0}, {"mask": True}, {"masked": 1}],
)
def test_an_answer_that_its_row_says_not_to_learn_is_masked(tmp_path: Path, flag: dict[str, Any]) -> None:
    row = {"messages": [{**Q, "weight": None}, {**A, **flag}, Q, {**A, **{key: not value for key, value in flag.items()}}]}
    assert [turn.masked for turn in turns(tmp_path, row)] == [False, True, False, False]


REFUSED = {
    "tool_calls": (answer(content=None, tool_calls=[{"id": 1}]), "'messages[1].tool_calls' holds calls of tools"),
    "tool_calls alone": ({"messages": [Q, {"role": "assistant", "tool_calls": [{"id": 1}]}]}, "'messages[1].tool_calls'"),
    "function_call": (answer(function_call={"name": "f"}), "'messages[1].function_call'"),
    "name": (answer(name="ada"), "'messages[1].name' holds the name of the speaker"),
    "refusal": (answer(refusal="no"), "'messages[1].refusal'"),
    "tools": ({"messages": [Q, A], "tools": [{"type": "function"}]}, "'tools' holds descriptions of tools"),
    "tools as JSON": ({"conversations": SHAREGPT, "tools": '[{"name": "f"}]'}, "'tools'"),
    "functions": ({"messages": [Q, A], "functions": [{"name": "f"}]}, "'functions'"),
    "images": ({**ALPACA, "images": ["a.png"]}, "'images' holds something that is no text"),
    "image of a text": ({"text": "t", "image": "a.png"}, "'image'"),
    "documents": ({"messages": [Q, A], "documents": [{"text": "d"}]}, "'documents'"),
    "rejected": ({"messages": [Q, A], "rejected": [A]}, "'rejected' holds a worse answer"),
    "a bad answer": ({"prompt": "q", "completion": "a", "label": False}, "'label' holds that the answer is a bad one"),
    "a bad answer of LLaMA-Factory": ({"messages": [Q, A], "kto_tag": False}, "'kto_tag'"),
    "chat_template_kwargs": ({"messages": [Q, A], "chat_template_kwargs": {"x": 1}}, "'chat_template_kwargs'"),
    "system of a raw prompt": ({"prompt": "q", "completion": "a", "system": "s"}, "'system' holds a system prompt"),
    "two systems": ({"messages": [{"role": "system", "content": "t"}, Q, A], "system": "s"}, "system and the first turn differ"),
    "history that is no list": ({**ALPACA, "history": "q"}, "field 'history' is a string"),
    "history without answers": ({**ALPACA, "history": [["q"]]}, "history[0] must be a list of two strings"),
    "history of numbers": ({**ALPACA, "history": [["q", 1]]}, "field 'history[0][1]' is a number"),
    "half a weight": (answer(weight=0.5), "messages[1].weight is 0.5; a turn is learned or not"),
    "a question to learn": ({"messages": [{**Q, "train": True}, A]}, "messages[0].train asks to learn a turn of the role 'user'"),
    "all masked": (answer(weight=0), "(turns: user, assistant, not to be learned)"),
    "reasoning of the user": ({"messages": [{**Q, "reasoning": "r"}, A]}, "messages[0] has the reasoning of a turn of role 'user'"),
    "two reasonings": (answer(reasoning="r", thinking="s"), "has reasoning and thinking, which differ"),
    "null": (answer(content=None), "field 'messages[1].content' is null"),
    "a picture": (answer(content=[{"type": "image_url", "image_url": "a"}]), "'messages[1].content[0]' is a part of type 'image_url'"),
    "broken JSON": ({"conversations": "[{"}, "field 'conversations' is a string that is not valid JSON"),
    **{
        role: ({"messages": [Q, A, {"role": role, "content": "x"}, A]}, f"messages[2].role is '{role}', the ")
        for role in ("tool", "function", "observation", "ipython", "function_call")
    },
}  # fmt: skip


@pytest.mark.parametrize(("row", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_learned_is_refused_by_its_name(tmp_path: Path, row: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as caught:
        turns(tmp_path, row)
    assert "a.jsonl:1: " in str(caught.value)
    assert says in str(caught.value)


def test_a_format_that_was_asked_for_ignores_the_fields_of_other_formats(tmp_path: Path) -> None:
    row = {"text": "rendered", "messages": [Q, A], "tools": [{"type": "function"}]}
    assert turns(tmp_path, row, "text") == (Turn("text", "rendered"),)
