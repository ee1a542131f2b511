"""Answers that a model generates, and whether they are right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence

from bilevel import InputError
from bilevel_llm.data.chat import PLAIN_TEMPLATE, Encoder, Template
from bilevel_llm.data.padding import as_ids
from bilevel_llm.data.rows import Row
from bilevel_llm.evaluation.answers import final_answer, same_answer

_TOKENS = 16_384  # of one batch of prompts and answers together, padding included; it bounds the memory of their keys
_NEXT_QUESTION = "\n" + PLAIN_TEMPLATE["user"].partition("{text}")[0].strip()


@dataclass(frozen=True)
class Question:
    """A row to be answered.

    prompt: the token ids up to the start of the row's last response.
    answer: the final answer of that response (see `answers`).
    end: the token that ends the response; None if there is none.
    """

    prompt: tuple[int, ...]
    answer: str
    end: int | None


def make_questions(rows: Sequence[Row], tokenizer: Any, template: Template) -> list[Question]:
    """Raise `InputError` for a row without a question or without a final answer."""
    questions = []
    for row, encoded in zip(rows, Encoder(tokenizer, template).encode(rows), strict=True):
        last = max(i for i, turn in enumerate(row.turns) if turn.learned)
        if row.turns[last].role == "text":
            raise InputError(f"{row.where}: exact_match needs a question and an answer, and this row is plain text")
        answer = final_answer(row.turns[last].text)
        if answer is None:
            raise InputError(
                f"{row.where}: exact_match needs a final answer (#### 42, \\boxed{{42}}, a number); none is here"
            )
        labels = np.array(encoded.labels)
        end = int(np.flatnonzero(labels)[-1])
        start = int(np.flatnonzero(~labels[: end + 1])[-1]) + 1
        control = encoded.ids[end] in tokenizer.all_special_ids or encoded.ids[end] in tokenizer.get_added_vocab().values()
        questions.append(Question(tuple(encoded.ids[:start]), answer, encoded.ids[end] if control else None))
    return questions


def check_room(questions: Sequence[Question], config: Any, max_new_tokens: int) -> None:
    """Raise `InputError` if a prompt and its answer need more positions than the model has."""
    positions = getattr(config, "max_position_embeddings", None)
    longest = max((len(question.prompt) for question in questions), default=0)
    if positions is not None and longest + max_new_tokens > positions:
        raise InputError(
            f"a test prompt of {longest} tokens and {max_new_tokens} new ones do not fit into the model's {positions} "
            "positions; lower compare.max_new_tokens or take out long rows"
        )


def exact_matches(questions: Sequence[Question], texts: Sequence[str | None]) -> NDArray[np.bool_]:
    """Whether the answer to each question is right. None is not."""
    right = [
        text is not None and same_answer(final_answer(text), question.answer)
        for text, question in zip(texts, questions, strict=True)
    ]
    return np.array(right, np.bool_)


@torch.inference_mode()
def generate(
    model: Any, tokenizer: Any, questions: Sequence[Question], max_new_tokens: int, part: tuple[int, int] = (0, 1)
) -> list[str | None]:
    """Greedy answers, up to the end of turn or where the next question of the plain template would begin.

    part: (i, n) answers batch i of every n, and leaves the other answers at None: n processes share the work.
    """
    from transformers import GenerationConfig

    device = next(model.parameters()).device
    pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    ends = sorted({q.end for q in questions if q.end is not None} | _ends(model, tokenizer))
    how = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad, eos_token_id=ends or None, use_cache=True
    )
    texts: list[str | None] = [None] * len(questions)
    order = sorted(range(len(questions)), key=lambda i: (-len(questions[i].prompt), i))  # alike in length, little padding
    for batch in islice(_batches(questions, order, max_new_tokens, part[1]), part[0], None, part[1]):
        length = len(questions[batch[0]].prompt)
        prompts = [as_ids(questions[i].prompt) for i in batch]
        ids, mask = (
            pad_sequence(rows, batch_first=True, padding_value=fill, padding_side="left")  # answers grow on the right
            for rows, fill in ((prompts, pad), ([torch.ones_like(prompt) for prompt in prompts], 0))
        )
        written = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=how)
        for i, text in zip(batch, tokenizer.batch_decode(written[:, length:], skip_special_tokens=True), strict=True):
            texts[i] = text.partition(_NEXT_QUESTION)[0]
    return texts


def _batches(
    questions: Sequence[Question], order: Sequence[int], max_new_tokens: int, processes: int
) -> Iterator[Sequence[int]]:
    """Questions of about the same length, at least one batch for every process."""
    start, most = 0, -(-len(order) // processes)
    while start < len(order):
        size = _TOKENS // (len(questions[order[start]].prompt) + max_new_tokens)
        yield order[start : start + min(most, max(1, size))]
        start += min(most, max(1, size))


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end a text, according to the model and its tokenizer."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    known = set(ends) if isinstance(ends, list) else {ends}
    return {token for token in known | {tokenizer.eos_token_id} if token is not None}
