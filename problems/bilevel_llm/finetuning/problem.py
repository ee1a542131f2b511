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
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from torch import nn

from bilevel import Finding, Forward, InputError, Labels, Loss, Shard, Stratified, Table
from bilevel.account import RUN
from bilevel.data import Stream
from bilevel.record import Record, total_size
from bilevel_llm.data.batches import TokenBatch, per_token
from bilevel_llm.data.near_duplicates import report_near_duplicates, rows_of_files, rows_of_table
from bilevel_llm.data.overlap import without_rows
from bilevel_llm.data.reading import each_row, reading_again
from bilevel_llm.data.registered_formats import FormatName
from bilevel_llm.data.rows import fingerprint
from bilevel_llm.data.settings import DataFiles
from bilevel_llm.data.short_forms import PathOrPaths
from bilevel_llm.data.tokens import TokenTable
from bilevel_llm.model.language_model import batch_losses
from bilevel_llm.problem import LanguageModelProblem

if TYPE_CHECKING:
    from rich.console import RenderableType

log = logging.getLogger("bilevel.llm")

_EXAMPLES = 3  # overlapping rows to name: enough to look them up


@dataclass
class FineTuning(LanguageModelProblem):
    """Tune a language model on rows of training data.

    Takes the settings of `LanguageModelProblem` too; `validation`, which may be empty, is evaluated on.

    data: the training rows: a file, a directory, a glob, or a list of them; or a mapping of the `path` and of how its rows
        are read (`DataFiles`). Rows may repeat, as in a mix.
    format: how a row of `data` is written; None detects it from each file's first row.
    held_out: files of test rows, which must not be trained on either: paths, or mappings as for `data`.
    on_overlap: what to do with training rows that also occur in `validation` or `held_out`: "drop" them, or make it an
        "error".
    mean_over: what the loss of a batch is the mean of. "rows": every row counts the same, however long its answer; source
        weights are learned for this loss, and a mix drawn by them holds a source's weight as its part of the rows.
        "tokens": every answer token counts the same, as most trainers have it.
    """

    data: str | list[str] | DataFiles
    _: KW_ONLY
    format: FormatName | None = None
    held_out: Annotated[list[str | DataFiles], PathOrPaths()] = field(default_factory=list)
    on_overlap: Literal["drop", "error"] = "drop"
    mean_over: Literal["rows", "tokens"] = "rows"

    resumed_by: ClassVar[tuple[str, ...]] = ("bilevel", "finetune", "--resume", "--output", RUN)
    labels: ClassVar[Labels] = Labels(
        unit="tokens", lower_loss="training loss", upper_loss="validation loss", upper_part="set"
    )

    def __post_init__(self) -> None:
        """Check what needs no file."""
        super().__post_init__()
        if isinstance(self.data, DataFiles) and self.format is not None:
            raise ValueError("format: the data are a mapping; give the format there, as in data: {path: FILE, format: NAME}")

    @property
    def source_tables(self) -> Mapping[str, TokenTable]:
        """The training data, as a single source."""
        return {"training data": self._train}

    @property
    def source_count(self) -> int:
        """One: the training data."""
        return 1

    @property
    def validation_rows(self) -> int:
        """About `batch_size` in all, with equally many rows of every set."""
        sets = len(self.validation)
        return sets * max(1, self.batch_size // sets) if sets else 0

    def prepare(self) -> None:
        """Find the model, read and tokenize all data, and take held-out rows out of the training data."""
        super().prepare()
        on_bad = reading_again(self.on_bad_row)
        report_near_duplicates(
            "validation or held-out data",
            {"the training data": rows_of_table(self._train, self._training_data)},
            {f"{i}": rows_of_files(data, on_bad) for i, data in enumerate((*self.validation, *self._held_out))},
        )

    def steps(self, *, epochs: float | None = None, tokens: int | None = None, seed: int = 0) -> int:
        """How many steps see every row `epochs` times, or at least so many tokens (prompts included)."""
        if epochs is not None:
            return max(1, math.ceil(epochs * len(self._train) / self.batch_size))
        assert tokens is not None
        lengths, seen = self._train.lengths, 0
        for index in itertools.count():
            seen += sum(int(lengths[row]) for _, row in self.lower_rows(index, seed))
            if seen >= tokens:
                return index + 1
        raise AssertionError("the count does not end")

    def upper(self) -> nn.Module:
        """An empty module: there is no upper variable."""
        return nn.Module()

    def lower_loss(self, x: Forward, y: Forward, batch: TokenBatch) -> Loss:
        """The mean over training rows, or over their labelled tokens."""
        return batch.means(batch_losses(y, batch)).sum()

    def artifacts(self, history: Sequence[Record], facts: Mapping[str, Any]) -> Mapping[str, str]:
        """The file training.json: steps, tokens, validation losses and the identity of data and model."""
        content = {
            "steps": len(history),
            "tokens": total_size(history),
            "validation": [
                {"step": record.step, "loss": record.metrics["upper_loss"], "parts": record.parts["upper_parts"]}
                for record in history
                if "upper_loss" in record.metrics
            ],
            **facts,
            **self.identity(),
        }
        return {"training.json": json.dumps(content, indent=1, ensure_ascii=False)}

    def identity(self) -> dict[str, Any]:
        """Rows and hashes of the data, name and hash of the model."""
        return {
            "data": {
                "training": {**self._train.identity, "dropped_as_held_out": self._read_train[1]},
                "validation": {name: table.identity for name, table in self._targets.items()},
            },
            "model": {"name": self.model, "hash": self._files.fingerprint},
        }

    def findings(self, history: Sequence[Record]) -> Sequence[Finding]:
        """Whether the validation loss has risen since its lowest point."""
        seen = [(record.metrics["upper_loss"], record.step) for record in history if "upper_loss" in record.metrics]
        if not seen or seen[-1][0] == min(seen)[0]:
            return []
        words = (
            f"the validation loss has risen since step {min(seen)[1]}, where it was lowest: fewer steps, or a smaller step "
            "size, may serve it better"
        )
        return [Finding("validation-rises", True, words)]

    def tables(self, history: Sequence[Record]) -> Sequence[Table]:
        """How many rows there are."""
        rows = [("training", len(self._train)), *((name, len(table)) for name, table in self._targets.items())]
        return [Table("Data", ("set", "rows"), rows)]

    def report(self, history: Sequence[Record]) -> RenderableType:
        """Where the losses came from and went to."""
        part = max(1, len(history) // 4)
        first, last = (
            np.mean([record.metrics["lower_loss"] for record in steps]) for steps in (history[:part], history[-part:])
        )
        lines = [
            f"training loss {first:.4f} -> {last:.4f} (means over the first and the last {part} of {len(history)} steps)"
        ]
        seen = [(record.step, record.metrics["upper_loss"]) for record in history if "upper_loss" in record.metrics]
        if seen:
            lowest = min(seen, key=lambda point: point[1])
            words = f"validation loss {seen[0][1]:.4f} before the first step"
            if len(seen) > 1:
                words += f", {seen[-1][1]:.4f} after {seen[-1][0]} steps, lowest {lowest[1]:.4f} after {lowest[0]}"
            lines.append(words)
        lines += [finding.sentence for finding in self.findings(history)]
        return "\n".join(f"- {line}" for line in lines)

    @property
    def _training_data(self) -> DataFiles:
        return self.data if isinstance(self.data, DataFiles) else DataFiles(self.data, format=self.format)

    @property
    def _held_out(self) -> list[DataFiles]:
        return [DataFiles(one) if isinstance(one, str) else one for one in self.held_out]

    @property
    def _train(self) -> TokenTable:
        return self._read_train[0]

    @cached_property
    def _read_train(self) -> tuple[TokenTable, int]:
        """The training rows that occur nowhere else, and how many others there were."""
        table = self._tokenize(self._training_data)
        elsewhere = {  # all rows of these files, whether or not a sample of them is validated on
            fingerprint(row): row.where
            for data in (*self.validation, *self._held_out)
            for path in data.files()
            for row in each_row(path, data.format, on_bad=reading_again(self.on_bad_row), fields=data.fields)
        }
        kept = without_rows(table, elsewhere)
        dropped = len(table) - len(kept)
        if dropped:
            found = (i for i, mark in enumerate(table.fingerprints.tolist()) if mark in elsewhere)
            examples = ", ".join(
                f"{table.where(i)} = {elsewhere[int(table.fingerprints[i])]}" for i in itertools.islice(found, _EXAMPLES)
            )
            words = f"{dropped} of {len(table)} training rows also occur in the validation or held-out data ({examples})"
            if self.on_overlap == "error":
                raise InputError(f"{words}; remove them, or set problem.on_overlap=drop")
            if not len(kept):
                raise InputError(f"{words}: nothing is left to train on")
            log.warning("%s; they are dropped from training", words)
        return kept, dropped

    @cached_property
    def _upper_sampler(self) -> Stratified:
        """With fewer rows of every set than `validation_rows` says, where one has fewer: a small set is seen whole."""
        sizes = tuple(map(len, self._targets.values()))
        return Stratified(sizes, min(self.validation_rows, len(sizes) * min(sizes)), Stream.UPPER)

    def _micro_batches(
        self, tables: Mapping[str, TokenTable], sampler: Stratified, index: int, shard: Shard
    ) -> Sequence[TokenBatch]:
        """Like the base class, with the weights that `mean_over` asks for."""
        batches = super()._micro_batches(tables, sampler, index, shard)
        if self.mean_over == "rows":
            return batches
        return per_token(batches, list(tables.values()), sampler.batch(index, shard.seed, shard.fold))
