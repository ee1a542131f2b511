"""A language model on a backend, to be scored and asked by all processes together: it may be split over them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from bilevel import Backend, Shard
from bilevel.blocks import find_blocks
from bilevel.optimizer import AdamW
from bilevel_llm.data.tokens import TokenTable
from bilevel_llm.evaluation.generation import Greedy, Prompts, Question, prompts
from bilevel_llm.evaluation.scores import RowBatch, Scores, Tally, row_batches
from bilevel_llm.model.files import ModelFiles
from bilevel_llm.model.language_model import LanguageModel
from bilevel_llm.model.suitability import Probe, can_be_packed, probe, probe_packed, require_independent

T = TypeVar("T")


class WritingModel(LanguageModel):
    """A language model that also writes. It does so within `forward`, where engines that split it gather its parameters."""

    def forward(self, *inputs: Any, **writing: Any) -> Tensor:
        """With keyword arguments, what the causal LM's `generate` returns for them; otherwise logits."""
        if not writing:
            return super().forward(*inputs)
        written: Tensor = self.model.generate(**writing)
        return written


@dataclass(frozen=True)
class Dealt(Generic[T]):
    """What a process does in one pass.

    counts: whether the result is wanted. Otherwise the process only takes part, as the others need it.
    """

    batch: T
    counts: bool


def deal(batches: Sequence[T], shard: Shard) -> list[Dealt[T]]:
    """This process's batches: every `world_size`-th, and repeated ones so that all processes have as many."""
    rounds = -(-len(batches) // shard.world_size)
    return [
        Dealt(batches[number % len(batches)], number < len(batches))
        for number in range(shard.rank, rounds * shard.world_size, shard.world_size)
    ]


class PlacedModel:
    """A causal LM on a started backend. All processes call its methods, and each gets a part of what they find."""

    def __init__(self, files: ModelFiles, backend: Backend, *, attention: str | None, trust_remote_code: bool) -> None:
        self._backend = backend
        self._tokenizer = files.load_tokenizer(trust_remote_code)
        self._settings = files.load_generation_settings(trust_remote_code)

        def build() -> LanguageModel:
            model, read = files.load(attention, trust_remote_code)
            model.generation_config = self._settings
            return WritingModel(model, read)

        self._model = backend.place("model", build, AdamW(), sharded=True, blocks=find_blocks)
        batch = Probe.of(self._tokenizer)
        require_independent(backend.measure(self._model, probe, batch))
        self._packed = can_be_packed(backend.measure(self._model, probe_packed, batch))

    def score(self, table: TokenTable) -> Scores:
        """This process's part of the scores of every row; the rows of other processes have zeros.

        Raises `NonFiniteError` if a loss is not finite.
        """
        tally, shard = Tally(table), self._backend.shard

        def loss(dealt: Dealt[RowBatch]) -> Tensor:
            (tally if dealt.counts else Tally(table)).add(self._model, dealt.batch)
            return torch.zeros((), device=dealt.batch.padded.ids.device)

        self._backend.evaluate(loss, deal(row_batches(table, packed=self._packed), shard))
        return tally.scores()

    def answers(self, questions: Sequence[Question], max_new_tokens: int) -> list[str | None]:
        """Greedy answers to the questions; None where another process has it."""
        shard = self._backend.shard
        answer = Greedy(self._settings, self._tokenizer, questions, max_new_tokens, together=shard.world_size > 1)
        texts: list[str | None] = [None] * len(questions)

        def loss(dealt: Dealt[Prompts]) -> Tensor:
            for number, text in zip(dealt.batch.numbers, answer(self._model, dealt.batch), strict=True):
                texts[number] = text if dealt.counts else texts[number]
            return torch.zeros((), device=dealt.batch.ids.device)

        self._backend.evaluate(loss, deal(prompts(questions, self._tokenizer, max_new_tokens, shard.world_size), shard))
        return texts


@contextmanager
def placed(
    files: ModelFiles, backend: Backend, *, on_cpu: bool, attention: str | None, trust_remote_code: bool
) -> Iterator[PlacedModel]:
    """A model on a backend with the settings of `backend`, which is not used itself.

    on_cpu: whether that is where it computes. It then does so in float32: bfloat16 would add rounding to differences that
        are small, and is no faster.

    Nothing is compiled, as lengths vary.
    """
    known = {field.name for field in fields(backend)}  # type: ignore[arg-type]  # every backend is a dataclass
    wanted: dict[str, Any] = {"compile": False, **({"dtype": "float32"} if on_cpu else {})}
    own: Backend = replace(backend, **{key: value for key, value in wanted.items() if key in known})  # type: ignore[type-var]
    own.start(0)
    try:
        yield PlacedModel(files, own, attention=attention, trust_remote_code=trust_remote_code)
    finally:
        own.close()
