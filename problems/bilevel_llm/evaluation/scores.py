"""How well a language model predicts the answers in data files: loss, perplexity, token accuracy.

The rows, their tokens and which of them count are those of training (`tokens`, `chat`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table
from torch import nn

from bilevel import InputError, NonFiniteError
from bilevel.files import write_atomic
from bilevel.terminal import Terminal
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


@torch.inference_mode()
def score(
    model: nn.Module,
    table: TokenTable,
    *,
    packed: bool = False,
    tokens_per_batch: int = 4096,
    part: tuple[int, int] = (0, 1),
) -> Scores:
    """Score every row of a table once.

    model: a `LanguageModel`, on the device to be used.
    packed: whether to compute tokens without padding, and equal ones once: what `suitability.examine` returns.
    tokens_per_batch: tokens of one forward pass, padding included; a longer row is a batch of its own. It
        bounds the memory of the logits (4096 x vocabulary x 4 bytes), and changes no result beyond rounding.
    part: (i, n) takes batch i of every n, and leaves the scores of all other rows at 0: n processes share the work, and
        their scores add up to those of one.

    Rows are batched with others of about their length, in a fixed order, so that little is padded and the same call gives
    the same numbers.
    """
    device = next(model.parameters()).device
    losses, correct = np.zeros(len(table)), np.zeros(len(table), np.int64)
    for rows in islice(_batches(table.lengths, tokens_per_batch), part[0], None, part[1]):
        padded = PaddedRows.of([table.row(int(row)) for row in rows])
        packing = [Packing.of(padded.ids, padded.positions).to(device)] if packed else []
        logits, targets = model(padded.ids.to(device), padded.positions.to(device), *packing), padded.targets.to(device)
        owners = padded.row.numpy()
        here = np.bincount(owners, token_losses(logits, targets).double().cpu().numpy(), len(rows))
        hits = np.bincount(owners, (logits.argmax(-1) == targets).cpu().numpy(), len(rows))
        losses[rows], correct[rows] = here, hits.astype(np.int64)
    if not np.isfinite(losses).all():
        bad = int(np.flatnonzero(~np.isfinite(losses))[0])
        raise NonFiniteError(f"the model's loss on row {bad} of {len(table)} is {losses[bad]}; its weights may hold NaN")
    return Scores(table.supervised, losses, correct)


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


def show(scores: Mapping[str, Scores], terminal: Terminal) -> None:
    """Print the summaries as a table, with a row for each file. Paths stand below it, each whole in a line of its own."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("file", justify="right")
    columns = {"rows": ",d", "tokens": ",d", "loss": ".4f", "perplexity": ".3f", "row_loss": ".4f", "token_accuracy": ".2%"}
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right")
    for number, one in enumerate(scores.values(), 1):
        summary = one.summary()
        table.add_row(str(number), *(format(summary[name], style) for name, style in columns.items()))
    terminal.print(table)
    for number, file in enumerate(scores, 1):
        terminal.print(f"file {number}: {file}", soft_wrap=True)


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
