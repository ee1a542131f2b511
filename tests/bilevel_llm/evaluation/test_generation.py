"""Answers that a model writes: prompts, greedy decoding in batches, and what counts as right."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bilevel import InputError
from bilevel_llm.data.rows import Row, Turn
from bilevel_llm.evaluation.generation import Greedy, exact_matches, make_questions, prompts
from bilevel_llm.model.files import find_model
from tests.bilevel_llm.tiny import make_tokenizer

SUMS = [(i, i + 1) for i in (3, 17, 256, 4)]


def row(question: str, answer: str) -> Row:
    return Row((Turn("user", question), Turn("assistant", answer)), "here:1")


@pytest.fixture
def model(model_directory: Callable[[str], Path]) -> Any:
    return find_model(str(model_directory("llama"))).load_model().eval()


@pytest.mark.parametrize("template", ["model", "plain"])
def test_a_prompt_is_what_training_saw_before_the_answer(template: str) -> None:
    tokenizer = make_tokenizer()
    (question,) = make_questions([row("1+1?", "It is\n#### 2")], tokenizer, template)  # type: ignore[arg-type]
    text = tokenizer.decode(question.prompt)
    if template == "model":
        assert text == "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
        assert question.end == tokenizer.convert_tokens_to_ids("<|im_end|>")
    else:
        assert text.removeprefix("<bos>") == "### Instruction:\n1+1?\n\n### Response:\n"
        assert question.end == tokenizer.eos_token_id
    assert question.answer == "2"


def test_of_several_turns_the_last_answer_is_asked_for() -> None:
    turns = (Turn("user", "1+1?"), Turn("assistant", "#### 2"), Turn("user", "and 2+2?"), Turn("assistant", "#### 4"))
    tokenizer = make_tokenizer()
    (question,) = make_questions([Row(turns, "here:1")], tokenizer, "model")
    assert tokenizer.decode(question.prompt).endswith("and 2+2?<|im_end|>\n<|im_start|>assistant\n")
    assert question.answer == "4"


def test_prompts_of_different_lengths_in_one_batch_get_the_greedy_answer_of_each(model: Any) -> None:
    """Against one forward a token, without padding or cache."""
    tokenizer = make_tokenizer()
    questions = make_questions([row("?" * n, "#### 1") for n in (1, 9, 4)], tokenizer, "model")
    (batch,) = prompts(questions, tokenizer, 6)
    texts = Greedy(model.generation_config, tokenizer, questions, 6)(model.generate, batch)
    with torch.inference_mode():
        for number, text in zip(batch.numbers, texts, strict=True):
            question = questions[number]
            ids = list(question.prompt)
            for _ in range(6):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] in (question.end, tokenizer.eos_token_id):
                    break
            assert text == tokenizer.decode(ids[len(question.prompt) :], skip_special_tokens=True)


def test_there_is_a_batch_of_prompts_for_every_process() -> None:
    tokenizer = make_tokenizer()
    questions = make_questions([row("?" * n, "#### 1") for n in (1, 9, 4, 2, 7)], tokenizer, "model")
    batches = prompts(questions, tokenizer, 4, processes=3)
    assert [batch.numbers for batch in batches] == [[1, 4], [2, 3], [0]]


def test_a_right_final_answer_counts_whatever_stands_before_it() -> None:
    questions = make_questions([row(f"{a}+1?", f"#### {b}") for a, b in SUMS], make_tokenizer(), "model")
    texts = ["The answer is 4.", "\\boxed{18}", "I think 256", None]
    assert exact_matches(questions, texts).tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (Row((Turn("text", "plain"),), "f:3"), "f:3: exact_match needs a question"),
        (row("1+1?", "who knows"), "here:1: exact_match needs a final answer"),
    ],
)
def test_rows_without_an_answer_are_refused(bad: Row, words: str) -> None:
    with pytest.raises(InputError, match=words):
        make_questions([bad], make_tokenizer(), "model")
