"""`llm-reweighting`: how much weight does each source of training data deserve, for a given target?

    min_λ  L1(y*(λ))    subject to    y*(λ) in argmin_y  Σ_i p_i(λ) · L2_i(y)

L2_i is the loss on source i, L1 the loss on the validation sets, p(λ) the source weights, y a language model (Pan et al.,
"ScaleBiO", ACL 2025, arXiv 2406.19976). Both are means over rows of a row's mean over its labelled tokens.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from bilevel import Forward, InputError, Loss, Problem, Shard, Stratified
from bilevel.cost import Cost
from bilevel.data import Stream
from bilevel.problem import Record
from bilevel_problems.llm.batches import TokenBatch, micro_batches
from bilevel_problems.llm.cost import full_loss, planned_attention
from bilevel_problems.llm.language_model import LanguageModel, token_losses
from bilevel_problems.llm.model_files import ModelFiles, find_model
from bilevel_problems.llm.overlap import find_overlap
from bilevel_problems.llm.source_weights import SourceWeights, divergence, logits_of, named_distribution
from bilevel_problems.llm.tokens import TokenTable, default_cache, tokenise
from bilevel_problems.llm.trust import Trust

if TYPE_CHECKING:
    from rich.console import RenderableType

log = logging.getLogger("bilevel.llm")

Format = Literal["alpaca", "sharegpt", "messages", "prompt_completion", "text"]
Start = Literal["uniform", "size"] | dict[str, float]


@dataclass(frozen=True)
class Source:
    """A source of training data.

    name: what its weight is called.
    path: a file, a directory, a glob, or a list of them.
    format: how a row is written; None detects it from the first row.
    """

    name: str
    path: str | list[str]
    format: Format | None = None


@dataclass(frozen=True)
class ValidationSet:
    """What the weights should serve. `weight` is its part of the upper loss, relative to the other sets."""

    path: str | list[str]
    name: str = "validation"
    format: Format | None = None
    weight: float = 1.0


@dataclass
class LLMReweighting(Problem[TokenBatch]):
    """Learn one weight for each source.

    model: a local directory, a GGUF file, a hub id that is already in the local cache, or "smollm2-135m".
    sources: at least two.
    validation: the target; at least one set.
    max_length: tokens of a row; longer rows are cut at the end.
    batch_size: rows of one training batch; every source gets an equal part of it.
    validation_batch_size: rows of one validation batch; None takes batch_size.
    initial: weights to start from: "uniform", "size" (in proportion to rows) or a weight for each source.
    floor: smallest weight a source can get.
    prior, prior_strength: adds prior_strength * KL(weights || prior) to the upper loss, a pull that keeps weights from
        collapsing to one source. 0: none.
    template: how turns become text: "auto" takes the model's own chat template where it has one, else "plain".
    on_overlap: what to do if validation rows also occur in a source: "report" it, or make it an "error".
    attention: attention implementation of transformers ("eager", "sdpa", "flash_attention_2"); None lets it choose.
    trust_remote_code: allow a model directory to bring code that is run. Off unless asked for.

    Paths are relative to the working directory.
    """

    model: str
    sources: list[Source]
    validation: list[ValidationSet]
    max_length: int = 1024
    batch_size: int = 16
    validation_batch_size: int | None = None
    initial: Start = "uniform"
    floor: float = 0.0
    prior: Start = "uniform"
    prior_strength: float = 0.0
    template: Literal["auto", "model", "plain"] = "auto"
    on_overlap: Literal["report", "error"] = "report"
    attention: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Check what needs no file."""
        names = [source.name for source in self.sources]
        if len(names) < 2:
            raise ValueError("sources: at least two are needed; a single source always has all the weight")
        for position, name in enumerate(names):
            if name in names[:position]:
                raise ValueError(f"sources: the name {name!r} is used twice; give every source a name of its own")
        if not self.validation:
            raise ValueError("validation: at least one set is needed; it says what the weights should serve")
        if self.max_length < 2:
            raise ValueError(f"max_length must be at least 2, not {self.max_length}")
        if not 0 <= self.floor * len(names) < 1:
            raise ValueError(f"floor must be at least 0 and below 1/{len(names)} (one over the sources), not {self.floor}")
        if self.prior_strength < 0:
            raise ValueError(f"prior_strength must be at least 0, not {self.prior_strength}")
        if any(v.weight <= 0 for v in self.validation):
            raise ValueError("validation: every weight must be positive")

    def prepare(self) -> None:
        """Find the model, read and tokenise all data, and check that the two sides do not overlap."""
        for kind, tables in (("source", self._train), ("validation set", self._targets)):
            for name, table in tables.items():
                _tell(kind, name, table, self.max_length)
        self._distribution(self.initial, "problem.initial")
        self._distribution(self.prior, "problem.prior")
        _check_rows(self._train, self._lower_sampler)
        _check_rows(self._targets, self._upper_sampler)
        overlap = find_overlap(self._train, self._targets)
        if overlap:
            if self.on_overlap == "error":
                raise InputError(f"{overlap}; remove them, or set problem.on_overlap=report")
            log.warning("%s; their loss can be lowered by heart (problem.on_overlap=error refuses this)", overlap)

    def upper(self) -> nn.Module:
        """The source weights at their start."""
        return SourceWeights(self._distribution(self.initial, "problem.initial"), self.floor)

    def lower(self) -> nn.Module:
        """The language model."""
        return LanguageModel(self._files.load_model(self.attention, self.trust_remote_code))

    def upper_loss(self, x: Forward, y: Forward, batch: TokenBatch) -> Loss:
        """L1, with the pull to the prior."""
        losses = _source_means(y, batch)
        loss = torch.dot(self._target_weights.to(losses), losses)
        if self.prior_strength:
            weights = x()
            loss = loss + batch.share * self.prior_strength * divergence(weights, self._prior.to(weights))
        return loss, dict(zip(self._targets, losses.detach(), strict=True))

    def lower_loss(self, x: Forward, y: Forward, batch: TokenBatch) -> Loss:
        """Σ_i p_i · L2_i."""
        losses = _source_means(y, batch)
        return torch.dot(x().to(losses), losses), dict(zip(self._train, losses.detach(), strict=True))

    def upper_batch(self, index: int, shard: Shard) -> Sequence[TokenBatch]:
        """Rows of every validation set."""
        return micro_batches(list(self._targets.values()), self._upper_sampler, index, shard)

    def lower_batch(self, index: int, shard: Shard) -> Sequence[TokenBatch]:
        """Rows of every source."""
        return micro_batches(list(self._train.values()), self._lower_sampler, index, shard)

    def cost(self, labelled_share: float = 1.0) -> Cost:
        """A pass over rows of max_length tokens. Needs the model's config.json, neither weights nor data."""
        if not 0 < labelled_share <= 1:
            raise InputError(f"the labelled share is a part of the tokens, above 0 and at most 1, not {labelled_share}")
        files = find_model(self.model, weights=False)
        return Cost(
            build=lambda: LanguageModel(files.build_empty(planned_attention(self.attention), self.trust_remote_code)),
            blocks=self.blocks,
            loss=partial(full_loss, length=self.max_length, sources=len(self.sources), labelled_share=labelled_share),
            lower_rows=self.batch_size,
            upper_rows=self.validation_batch_size or self.batch_size,
            row_size=self.max_length,
            unit="tokens",
        )

    def summary(self, x: Forward) -> Mapping[str, float]:
        """The weights by source."""
        return dict(zip(self._train, x().tolist(), strict=True))

    def artifacts(self, history: Sequence[Record], facts: Mapping[str, Any]) -> Mapping[str, str]:
        """weights.json."""
        trust = Trust(history)
        final = history[-1]["upper"]
        logits = logits_of(torch.tensor(list(final.values()), dtype=torch.float64), self.floor)
        content = {
            "sources": final,
            "average": trust.average,
            "logits": dict(zip(final, logits.tolist(), strict=True)),
            "steps": len(history),
            "trust": trust.verdicts(),
            "trajectory": {name: [round(record["upper"][name], 6) for record in history] for name in final},
            **facts,
            "data": {"sources": _identity(self._train), "validation": _identity(self._targets)},
            "model": {"name": self.model, "hash": self._files.fingerprint},
        }
        return {"weights.json": json.dumps(content, indent=1, ensure_ascii=False)}

    def report(self, history: Sequence[Record]) -> RenderableType:
        """The table of weights, and whether to trust them."""
        return Trust(history).table({name: len(table) for name, table in self._train.items()})

    @cached_property
    def _files(self) -> ModelFiles:
        return find_model(self.model)

    @cached_property
    def _train(self) -> dict[str, TokenTable]:
        return {source.name: self._tokenise(source) for source in self.sources}

    @cached_property
    def _targets(self) -> dict[str, TokenTable]:
        named: dict[str, TokenTable] = {}
        for position, target in enumerate(self.validation):
            name = target.name if target.name not in named else f"{target.name}-{position + 1}"
            named[name] = self._tokenise(target)
        return named

    @cached_property
    def _tokenizer(self) -> Any:
        return self._files.load_tokenizer(self.trust_remote_code)

    @cached_property
    def _lower_sampler(self) -> Stratified:
        return Stratified(tuple(map(len, self._train.values())), self.batch_size, Stream.LOWER)

    @cached_property
    def _upper_sampler(self) -> Stratified:
        size = self.validation_batch_size or self.batch_size
        return Stratified(tuple(map(len, self._targets.values())), size, Stream.UPPER)

    @cached_property
    def _prior(self) -> Tensor:
        return self._distribution(self.prior, "problem.prior")

    @cached_property
    def _target_weights(self) -> Tensor:
        weights = torch.tensor([target.weight for target in self.validation])
        return weights / weights.sum()

    def _distribution(self, rule: Start, key: str) -> Tensor:
        return named_distribution(rule, list(self._train), [len(t) for t in self._train.values()], key)

    def _tokenise(self, data: Source | ValidationSet) -> TokenTable:
        return tokenise(
            [data.path] if isinstance(data.path, str) else data.path,
            self._tokenizer,
            format=data.format,
            template=self.template,
            max_length=self.max_length,
            cache=default_cache() / "tokens",
        )


def _source_means(y: Forward, batch: TokenBatch) -> Tensor:
    """This micro-batch's part of the mean loss of every source. Shape: (sources,).

    Summed in float64 (where the device has it): what moves the weights is a small difference of these means.
    """
    losses = token_losses(y(batch.ids, batch.positions), batch.targets)
    dtype = torch.float32 if losses.device.type == "mps" else torch.float64
    return batch.weights.to(dtype) @ losses.to(dtype)


def _identity(tables: Mapping[str, TokenTable]) -> dict[str, dict[str, Any]]:
    return {name: {"rows": len(table), "hash": table.content_hash} for name, table in tables.items()}


def _tell(kind: str, name: str, table: TokenTable, max_length: int) -> None:
    """What was read, and what of it will not be seen."""
    words = f"{kind} {name!r}: {len(table)} rows"
    if table.truncated:
        words += f", {table.truncated} cut at {max_length} tokens"
    if table.dropped:
        words += f", {table.dropped} left out (nothing to learn within {max_length} tokens)"
    log.info("%s", words)
    for note, rows in table.notes.items():
        log.info("%s %r: in %d rows, %s", kind, name, rows, note)


def _check_rows(tables: Mapping[str, TokenTable], sampler: Stratified) -> None:
    """A batch must not need the same row twice."""
    needed = -(-sampler.batch_size // len(sampler.sizes))
    for name, table in tables.items():
        if len(table) < needed:
            raise InputError(
                f"{name!r} has {len(table)} usable rows, and a batch of {sampler.batch_size} needs {needed} of it; "
                "add rows or lower the batch size"
            )
