"""`llm-finetuning`: supervised fine-tuning, the lower level of `llm-reweighting` alone.

    min_y  L2(y)

L2 is the loss on the training rows. The upper loss, L1, is that on the validation sets: solvers that only train (`descent`)
evaluate it and follow L2. There is no upper variable.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from bilevel import Forward, InputError, Loss, Problem, Shard, Stratified
from bilevel.data import Stream
from bilevel.problem import Record
from bilevel_llm.data.batches import TokenBatch, micro_batches
from bilevel_llm.data.overlap import without_rows
from bilevel_llm.data.rows import fingerprint, read_rows
from bilevel_llm.data.settings import Format, ValidationSet, check_set_weights, patterns_of, unique_names
from bilevel_llm.data.tokens import TokenTable, default_cache, report_table, tokenise
from bilevel_llm.model.files import ModelFiles, find_model
from bilevel_llm.model.language_model import LanguageModel, token_losses
from bilevel_llm.model.lora import LoRA, require_peft

if TYPE_CHECKING:
    from rich.console import RenderableType

log = logging.getLogger("bilevel.llm")

_EXAMPLES = 3  # overlapping rows to name: enough to look them up


@dataclass
class FineTuning(Problem[TokenBatch]):
    """Tune a language model on rows of training data.

    model: a local directory, a GGUF file, a hub id that is already in the local cache, or "smollm2-135m".
    data: the training rows: a file, a directory, a glob, or a list of them. Rows may repeat, as in a mix.
    validation: sets to evaluate on; `weight` is a set's part of the validation loss.
    held_out: files of test rows, which must not be trained on either.
    on_overlap: what to do with training rows that also stand in `validation` or `held_out`: "drop" them, or make it an
        "error".
    lora: train adapters of this kind instead of the weights.
    mean_over: what the loss of a batch is the mean of. "rows": every row counts the same, however long its answer; source
        weights are learned for this loss, and a mix drawn by them holds a source's weight as its part of the rows.
        "tokens": every answer token counts the same, as most trainers have it.
    max_length: tokens of a row; longer rows are cut at the end.
    batch_size: rows of one training batch.
    format: how a row of `data` is written; None detects it from each file's first row.
    template: how turns become text: "auto" takes the model's own chat template where it has one, else "plain".
    attention: attention implementation of transformers ("eager", "sdpa", "flash_attention_2"); None lets it choose.
    trust_remote_code: allow a model directory to bring code that is run. Off unless asked for.

    Paths are relative to the working directory.
    """

    model: str
    data: str | list[str]
    validation: list[ValidationSet] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    on_overlap: Literal["drop", "error"] = "drop"
    lora: LoRA | None = None
    mean_over: Literal["rows", "tokens"] = "rows"
    max_length: int = 1024
    batch_size: int = 16
    format: Format | None = None
    template: Literal["auto", "model", "plain"] = "auto"
    attention: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Check what needs no file."""
        if self.max_length < 2:
            raise ValueError(f"max_length must be at least 2, not {self.max_length}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}")
        check_set_weights(self.validation)

    def prepare(self) -> None:
        """Find the model, read and tokenise all data, and take held-out rows out of the training data."""
        if self.lora is not None:
            require_peft()
        for kind, table in (("training data", self._train), *((f"validation {n!r}", t) for n, t in self._targets.items())):
            report_table(kind, table, self.max_length)
        if len(self._train) < self.batch_size:
            raise InputError(
                f"the training data has {len(self._train)} usable rows, and a batch has {self.batch_size}; "
                "add rows or lower problem.batch_size"
            )

    def steps(self, *, epochs: float | None = None, tokens: int | None = None, seed: int = 0) -> int:
        """How many steps see every row `epochs` times, or at least so many tokens (prompts included)."""
        if epochs is not None:
            return max(1, math.ceil(epochs * len(self._train) / self.batch_size))
        assert tokens is not None
        lengths, seen = self._train.lengths, 0
        for index in itertools.count():
            seen += sum(int(lengths[row]) for _, row in self._lower_sampler.batch(index, seed))
            if seen >= tokens:
                return index + 1
        raise AssertionError("the count does not end")

    def upper(self) -> nn.Module:
        """Nothing."""
        return nn.Module()

    def lower(self) -> nn.Module:
        """The language model, with adapters where asked for."""
        model = self._files.load_model(self.attention, self.trust_remote_code)
        return LanguageModel(model if self.lora is None else self.lora.wrap(model))

    def upper_loss(self, x: Forward, y: Forward, batch: TokenBatch) -> Loss:
        """The weighted mean over validation sets."""
        losses = _means(y, batch)
        weights = torch.tensor([target.weight for target in self.validation]).to(losses)
        return torch.dot(weights / weights.sum(), losses), dict(zip(self._targets, losses.detach(), strict=True))

    def lower_loss(self, x: Forward, y: Forward, batch: TokenBatch) -> Loss:
        """The mean over training rows, or over their labelled tokens."""
        return _means(y, batch).sum()

    def upper_batch(self, index: int, shard: Shard) -> Sequence[TokenBatch]:
        """Rows of every validation set; none if there is no set."""
        if not self.validation:
            return []
        return self._batch(list(self._targets.values()), self._upper_sampler, index, shard)

    def lower_batch(self, index: int, shard: Shard) -> Sequence[TokenBatch]:
        """Training rows: all of them in random order, then in another one."""
        return self._batch([self._train], self._lower_sampler, index, shard)

    def artifacts(self, history: Sequence[Record], facts: Mapping[str, Any]) -> Mapping[str, str]:
        """training.json."""
        content = {
            "steps": len(history),
            "tokens": sum(record["size"] for record in history),
            "validation": [
                {"step": record["step"], "loss": record["upper_loss"], "parts": record["upper_parts"]}
                for record in history
                if "upper_loss" in record
            ],
            **facts,
            "data": {
                "training": {**_identity(self._train), "dropped_as_held_out": self._read_train[1]},
                "validation": {name: _identity(table) for name, table in self._targets.items()},
            },
            "model": {"name": self.model, "hash": self._files.fingerprint},
        }
        return {"training.json": json.dumps(content, indent=1, ensure_ascii=False)}

    def report(self, history: Sequence[Record]) -> RenderableType:
        """Where the losses came from and went to."""
        part = max(1, len(history) // 4)
        first, last = (np.mean([record["lower_loss"] for record in steps]) for steps in (history[:part], history[-part:]))
        lines = [
            f"training loss {first:.4f} -> {last:.4f} (means over the first and the last {part} of {len(history)} steps)"
        ]
        seen = [(record["step"], record["upper_loss"]) for record in history if "upper_loss" in record]
        if seen:
            lowest = min(seen, key=lambda point: point[1])
            words = f"validation loss {seen[0][1]:.4f} before the first step"
            if len(seen) > 1:
                words += f", {seen[-1][1]:.4f} after {seen[-1][0]} steps, lowest {lowest[1]:.4f} after {lowest[0]}"
            lines.append(words)
            if lowest != seen[-1]:
                lines.append("the validation loss has risen since: fewer steps, or a smaller step size, may serve it better")
        return "\n".join(f"- {line}" for line in lines)

    @cached_property
    def _files(self) -> ModelFiles:
        return find_model(self.model)

    @cached_property
    def _tokenizer(self) -> Any:
        return self._files.load_tokenizer(self.trust_remote_code)

    @property
    def _train(self) -> TokenTable:
        return self._read_train[0]

    @cached_property
    def _read_train(self) -> tuple[TokenTable, int]:
        """The training rows that stand nowhere else, and how many others there were."""
        table = self._tokenise(self.data, self.format)
        elsewhere = {
            fingerprint(row): row.where
            for path, format in (*((v.path, v.format) for v in self.validation), *((path, None) for path in self.held_out))
            for row in read_rows(patterns_of(path), format=format)
        }
        kept = without_rows(table, elsewhere)
        dropped = len(table) - len(kept)
        if dropped:
            found = (i for i, mark in enumerate(table.fingerprints.tolist()) if mark in elsewhere)
            examples = ", ".join(
                f"{table.where(i)} = {elsewhere[int(table.fingerprints[i])]}" for i in itertools.islice(found, _EXAMPLES)
            )
            words = f"{dropped} of {len(table)} training rows also stand in the validation or held-out data ({examples})"
            if self.on_overlap == "error":
                raise InputError(f"{words}; remove them, or set problem.on_overlap=drop")
            if not len(kept):
                raise InputError(f"{words}: nothing is left to train on")
            log.warning("%s; they are dropped from training", words)
        return kept, dropped

    @cached_property
    def _targets(self) -> dict[str, TokenTable]:
        return {
            name: self._tokenise(v.path, v.format)
            for name, v in zip(unique_names(self.validation), self.validation, strict=True)
        }

    @cached_property
    def _lower_sampler(self) -> Stratified:
        return Stratified((len(self._train),), self.batch_size, Stream.LOWER)

    @cached_property
    def _upper_sampler(self) -> Stratified:
        """As many rows of every set, about batch_size in all, and none twice in a batch."""
        sizes = tuple(map(len, self._targets.values()))
        return Stratified(sizes, len(sizes) * min(*sizes, max(1, self.batch_size // len(sizes))), Stream.UPPER)

    def _batch(self, tables: Sequence[TokenTable], sampler: Stratified, index: int, shard: Shard) -> list[TokenBatch]:
        by_rows = micro_batches(tables, sampler, index, shard)
        if self.mean_over == "rows":
            return by_rows
        targets = torch.zeros(len(tables), 1)  # of the global batch, all processes together
        for table, row in sampler.batch(index, shard.seed):
            targets[table] += int(tables[table].row(row)[1].sum())
        return [replace(batch, weights=(batch.weights > 0) / targets) for batch in by_rows]

    def _tokenise(self, path: str | list[str], format: str | None) -> TokenTable:
        return tokenise(
            patterns_of(path),
            self._tokenizer,
            format=format,
            template=self.template,
            max_length=self.max_length,
            cache=default_cache() / "tokens",
        )


def _means(y: Forward, batch: TokenBatch) -> Tensor:
    """This micro-batch's part of the mean loss of every table. Shape: (tables,)."""
    losses = token_losses(y(batch.ids, batch.positions), batch.targets)
    return batch.weights.to(losses) @ losses


def _identity(table: TokenTable) -> dict[str, Any]:
    return {"rows": len(table), "hash": table.content_hash}
