"""How well a language model predicts the answers in data files: loss, perplexity, token accuracy.

The rows, their tokens and which of them count are those of training (`tokens`, `chat`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table
from torch import nn

from bilevel import Forward, InputError, NonFiniteError
from bilevel.batch import map_tensors
from bilevel.files import write_atomic
from bilevel_llm.data.chat import Template
from bilevel_llm.data.packing import Packing
from bilevel_llm.data.padding import PaddedRows
from bilevel_llm.data.reading import OnBadRow
from bilevel_llm.data.settings import DataFiles, DataSet
from bilevel_llm.data.tokens import TokenTable, default_cache, report_table, tokenize
from bilevel_llm.model.files import find_model
from bilevel_llm.model.language_model import LanguageModel
from bilevel_llm.model.limits import check_limits
from bilevel_llm.model.suitability import examine
from bilevel_llm.model.token_losses import token_losses

TOKENS_PER_BATCH = 4096


@dataclass(frozen=True, eq=False)
class Scores:
    """How a model scores on every row of a table, in the order of the table.

    targets: labelled tokens. Shape: (rows,).
    losses: cross-entropy, in nats, summed over the row's labelled tokens. Shape: (rows,).
    correct: labelled tokens to which the model gives the highest probability. Shape: (rows,).
    """

    targets: NDArray[np.int64]
    losses: NDArray[np.float64]
    correct: NDArray[np.int64]

    @property
    def loss(self) -> float:
        """Mean over labelled tokens, in nats."""
        return float(self.losses.sum() / self.targets.sum())

    @property
    def row_loss(self) -> float:
        """Mean over rows of a row's mean: what training with `mean_over: rows`, and reweighting, minimize."""
        return float((self.losses / self.targets).mean())

    @property
    def accuracy(self) -> float:
        """The share of the labelled tokens that are the model's first choice, given all tokens before them."""
        return float(self.correct.sum() / self.targets.sum())

    def summary(self) -> dict[str, float]:
        """The scores in a few numbers. Perplexities are the exponentials of the losses."""
        return {
            "rows": len(self.targets),
            "tokens": int(self.targets.sum()),
            "loss": self.loss,
            "perplexity": float(np.exp(self.loss)),
            "row_loss": self.row_loss,
            "row_perplexity": float(np.exp(self.row_loss)),
            "token_accuracy": self.accuracy,
        }


@dataclass(frozen=True, eq=False)
class RowBatch:
    """Rows of a table that are scored together.

    padded: their tokens, and what is to be predicted.
    packing: which places of them are computed; None for all.
    numbers: of the rows in the table. Shape: (rows,).
    """

    padded: PaddedRows
    packing: Packing | None
    numbers: NDArray[np.int64]


class Tally:
    """Collects the scores of a table's rows, batch by batch; a row that no batch had keeps zeros."""

    def __init__(self, table: TokenTable) -> None:
        self._table = table
        self._losses, self._correct = np.zeros(len(table)), np.zeros(len(table), np.int64)

    def add(self, model: Forward, batch: RowBatch) -> None:
        """Score a batch, which is on the model's device."""
        padded, rows = batch.padded, len(batch.numbers)
        logits = model(padded.ids, padded.positions, *([] if batch.packing is None else [batch.packing]))
        owners = padded.row.cpu().numpy()
        losses = token_losses(logits, padded.targets).double().cpu().numpy()
        hits = (logits.argmax(-1) == padded.targets).cpu().numpy()
        self._losses[batch.numbers] = np.bincount(owners, losses, rows)
        self._correct[batch.numbers] = np.bincount(owners, hits, rows).astype(np.int64)

    def scores(self) -> Scores:
        """What was collected. Raises `NonFiniteError`, naming the row, if a loss is not finite."""
        if not np.isfinite(self._losses).all():
            bad = int(np.flatnonzero(~np.isfinite(self._losses))[0])
            raise NonFiniteError(
                f"the model's loss on row {bad} of {len(self._table)} is {self._losses[bad]}; its weights may hold NaN"
            )
        return Scores(self._table.supervised, self._losses, self._correct)


def row_batches(table: TokenTable, *, packed: bool = False, tokens_per_batch: int = TOKENS_PER_BATCH) -> list[RowBatch]:
    """Every row of a table once, with others of about its length and in a fixed order.

    So little is padded, and the same call gives the same numbers. For the settings, see `score`.
    """
    batches = []
    for numbers in _batches(table.lengths, tokens_per_batch):
        padded = PaddedRows.of([table.row(int(number)) for number in numbers])
        batches.append(RowBatch(padded, Packing.of(padded.ids, padded.positions) if packed else None, numbers))
    return batches


@torch.inference_mode()
def score(model: nn.Module, table: TokenTable, *, packed: bool = False, tokens_per_batch: int = TOKENS_PER_BATCH) -> Scores:
    """Score every row of a table once.

    model: a `LanguageModel`, on the device to be used.
    packed: whether to compute tokens without padding, and equal ones once: what `suitability.examine` returns.
    tokens_per_batch: tokens of one forward pass, padding included; a longer row is a batch of its own. It
        bounds the memory of the logits (4096 x vocabulary x 4 bytes), and changes no result beyond rounding.
    """
    device, tally = next(model.parameters()).device, Tally(table)
    for batch in row_batches(table, packed=packed, tokens_per_batch=tokens_per_batch):
        tally.add(model, map_tensors(lambda tensor: tensor.to(device), batch))
    return tally.scores()


def evaluate(
    model: str,
    data: Sequence[str | DataSet],
    *,
    max_length: int = 1024,
    format: str | None = None,
    fields: dict[str, str] | None = None,
    template: Template = "auto",
    on_bad_row: OnBadRow = "error",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> dict[str, Scores]:
    """Score a model on data files: file -> scores.

    model: as in a recipe: a directory, a GGUF file, a hub id in the local cache, or "smollm2-135m". It is run in the
        precision of its files, without dropout.
    data: files, directories and globs, as for `tokenize`, or sets of them with settings of their own; also format and
        fields (of the former), template, max_length and on_bad_row. A set of which a sample is read is scored as one.
    device: "auto" takes CUDA where there is one.

    Raises `InputError` for a model or data that cannot be read, before the model is loaded.
    """
    where = _device(device)
    files = find_model(model)
    tokenizer = files.load_tokenizer(trust_remote_code)
    try:
        sets = [DataFiles(one, format=format, fields=fields) if isinstance(one, str) else one for one in data]
    except ValueError as error:
        raise InputError(str(error)) from error
    tables = {
        name: tokenize(
            files_of_one,
            tokenizer,
            template=template,
            max_length=max_length,
            cache=default_cache() / "tokens",
            on_bad_row=on_bad_row,
        )
        for one in sets
        for name, files_of_one in _parts(one).items()
    }
    for path, read in tables.items():
        report_table(path, read, max_length)
    check_limits(files.build_empty(trust_remote_code=trust_remote_code), tables)
    module = LanguageModel(files.load_model(trust_remote_code=trust_remote_code)).to(where)
    packed = examine(module, tokenizer)
    return {path: score(module, table, packed=packed) for path, table in tables.items()}


def table(scores: Mapping[str, Scores]) -> Table:
    """The summaries as a table, with a row for each file, which has as much of its path as tells it from the others."""
    shown = Table(box=None, header_style="bold", pad_edge=False)
    names = _told_apart(list(scores))
    shown.add_column("file", overflow="fold")
    columns = {"rows": ",d", "tokens": ",d", "loss": ".4f", "perplexity": ".3f", "row_loss": ".4f", "token_accuracy": ".2%"}
    for name in columns:
        shown.add_column(name.replace("_", " "), justify="right")
    for name, one in zip(names, scores.values(), strict=True):
        summary = one.summary()
        shown.add_row(name, *(format(summary[name], style) for name, style in columns.items()))
    return shown


def _told_apart(paths: Sequence[str]) -> list[str]:
    """The ends of paths, with as many folders as make them different."""
    parts = [path.split("/") for path in paths]
    for length in range(1, max(map(len, parts), default=1) + 1):
        ends = ["/".join(one[-length:]) for one in parts]
        if len(set(ends)) == len(ends):
            return ends
    return list(paths)


def write(scores: Mapping[str, Scores], file: Path) -> None:
    """The summaries as JSON: file -> numbers."""
    write_atomic(file, json.dumps({path: one.summary() for path, one in scores.items()}, indent=1, ensure_ascii=False))


def _parts(data: DataSet) -> dict[str, DataSet]:
    """A set by its files; as a whole where a sample of it is read."""
    if data.max_rows is not None:
        return {", ".join(data.patterns): data}
    return {str(path): DataFiles(str(path), format=data.format, fields=data.fields) for path in data.files()}


def _batches(lengths: NDArray[np.int64], budget: int) -> Iterator[NDArray[np.int64]]:
    """Row numbers, longest first, cut so that rows x longest row stays within the budget."""
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        size = max(1, budget // int(lengths[order[start]]))
        yield order[start : start + size]
        start += size


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: this machine cannot use it: {error}") from error
