"""Answers that a model generates, and whether they are right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
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


@dataclass(frozen=True, eq=False)
class Prompts:
    """Questions that are answered together.

    ids, mask: their tokens, padded on the left, since answers grow on the right. Shape: (questions, length).
    numbers: of the questions.
    """

    ids: Tensor
    mask: Tensor
    numbers: Sequence[int]


def prompts(questions: Sequence[Question], tokenizer: Any, max_new_tokens: int, processes: int = 1) -> list[Prompts]:
    """Questions in batches of about the same length, so that little is padded; at least one for each process."""
    order = sorted(range(len(questions)), key=lambda i: (-len(questions[i].prompt), i))
    start, most, batches = 0, -(-len(order) // processes), []
    while start < len(order):
        size = max(1, _TOKENS // (len(questions[order[start]].prompt) + max_new_tokens))
        numbers = order[start : start + min(most, size)]
        rows = [as_ids(questions[i].prompt) for i in numbers]
        ids, mask = (
            pad_sequence(of, batch_first=True, padding_value=fill, padding_side="left")
            for of, fill in ((rows, _pad(tokenizer)), ([torch.ones_like(row) for row in rows], 0))
        )
        batches.append(Prompts(ids, mask, numbers))
        start += len(numbers)
    return batches


class Greedy:
    """Answers greedily, up to the end of turn or where the next question of the plain template would begin.

    settings: the model's `generation_config`.
    together: whether other processes hold parts of the model, so that all have to write as many tokens.
    """

    def __init__(
        self, settings: Any, tokenizer: Any, questions: Sequence[Question], max_new_tokens: int, *, together: bool = False
    ) -> None:
        from transformers import GenerationConfig

        ends = sorted({q.end for q in questions if q.end is not None} | _ends(settings, tokenizer))
        self._tokenizer, self._together = tokenizer, together
        self._how = GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=_pad(tokenizer), eos_token_id=ends or None,
            use_cache=True,
        )  # fmt: skip

    def __call__(self, write: Callable[..., Tensor], prompts: Prompts) -> list[str]:
        """The answers. write: the model's `generate`, by whatever way it is called."""
        written = write(
            input_ids=prompts.ids, attention_mask=prompts.mask, generation_config=self._how, synced_gpus=self._together
        )
        texts = self._tokenizer.batch_decode(written[:, prompts.ids.shape[1] :], skip_special_tokens=True)
        return [text.partition(_NEXT_QUESTION)[0] for text in texts]


def _pad(tokenizer: Any) -> int:
    return next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)


def _ends(settings: Any, tokenizer: Any) -> set[int]:
    """The tokens that end a text, according to the model and its tokenizer."""
    ends = getattr(settings, "eos_token_id", None)
    known = set(ends) if isinstance(ends, list) else {ends}
    return {token for token in known | {tokenizer.eos_token_id} if token is not None}
