"""The test sets of a comparison, whose rows appear neither in the sources nor in the validation data, and their scores."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bilevel import InputError
from bilevel.errors import DamagedError
from bilevel.files import write_atomic
from bilevel.launch import local_rank
from bilevel_llm.comparison.settings import Metric, TestSet
from bilevel_llm.data.chat import Template
from bilevel_llm.data.near_duplicates import report_near_duplicates, rows_of_table
from bilevel_llm.data.overlap import without_rows
from bilevel_llm.data.tokens import TokenTable, default_cache, report_table, rows_of, tokenize
from bilevel_llm.evaluation.generation import Question, check_room, exact_matches, make_questions
from bilevel_llm.evaluation.placed_model import PlacedModel
from bilevel_llm.model.files import ModelFiles
from bilevel_llm.model.limits import check_limits
from bilevel_llm.reweighting.problem import LLMReweighting

log = logging.getLogger("bilevel.llm")

BETTER: Mapping[Metric, str] = {
    "loss": "lower",
    "row_loss": "lower",
    "perplexity": "lower",
    "token_accuracy": "higher",
    "exact_match": "higher",
}
UNITS: Mapping[Metric, str] = {"loss": "nats", "row_loss": "nats"}


@dataclass(frozen=True, eq=False)
class HeldOut:
    """One test set, ready to be scored.

    dropped: how many rows are left out because they appear in the sources or in the validation data.
    questions: one for each row of the table if exact_match is measured; otherwise empty.
    """

    name: str
    metrics: tuple[Metric, ...]
    table: TokenTable
    dropped: int
    questions: Sequence[Question]


@dataclass(frozen=True, eq=False)
class RowScores:
    """A model's scores on every row of a test set.

    sums: metric -> the sum over what each row counts: losses or hits over its tokens, its mean loss, or whether it is right.
    counts: metric -> what each row counts: its answer tokens, or 1. The metric is Σ sums / Σ counts. Shapes: (rows,).
    """

    sums: Mapping[str, NDArray[np.float64]]
    counts: Mapping[str, NDArray[np.float64]]

    def value(self, metric: str) -> float:
        """The metric over the whole set."""
        if metric == "perplexity":
            return float(np.exp(self.value("loss")))
        return float(self.sums[metric].sum() / self.counts[metric].sum())

    def save(self, file: Path) -> None:
        """Write the scores as an .npz file."""
        buffer = io.BytesIO()
        arrays = {f"sums/{k}": v for k, v in self.sums.items()} | {f"counts/{k}": v for k, v in self.counts.items()}
        np.savez(buffer, **arrays)  # type: ignore[arg-type]  # the names are ours
        write_atomic(file, buffer.getvalue())

    @classmethod
    def load(cls, file: Path, metrics: Sequence[Metric]) -> RowScores:
        """Read what `save` wrote. Raises `DamagedError` if the file is not that, or does not hold these metrics."""
        names: list[str] = ["loss" if metric == "perplexity" else metric for metric in metrics]
        try:
            with file.open("rb") as stream, np.load(stream) as stored:
                sums = {name: stored[f"sums/{name}"] for name in names}
                counts = {name: stored[f"counts/{name}"] for name in names}
        except Exception as error:  # numpy and zipfile raise nine kinds of them for what is in the file
            raise DamagedError(f"{file}: it does not hold the scores of rows: {error}") from error
        return cls(sums, counts)


@dataclass(frozen=True, eq=False)
class ModelScores:
    """A model's scores on every test set, or the part of them that a process has.

    rows: test set -> its scores; what other processes score is 0.
    answers: test set -> the generated answers; None: another process has it.
    """

    rows: Mapping[str, RowScores]
    answers: Mapping[str, Sequence[str | None]]


def joined(parts: Sequence[ModelScores]) -> ModelScores:
    """The scores of which every process has a part."""
    rows = {
        name: RowScores(
            {metric: np.sum([part.rows[name].sums[metric] for part in parts], 0) for metric in one.sums}, one.counts
        )
        for name, one in parts[0].rows.items()
    }
    answers = {
        name: [
            next(text for text in texts if text is not None) for texts in zip(*(p.answers[name] for p in parts), strict=True)
        ]
        for name in parts[0].answers
    }
    return ModelScores(rows, answers)


def read_held_out(
    test: TestSet,
    problem: LLMReweighting,
    elsewhere: Mapping[str, NDArray[np.uint64]],
    files: ModelFiles,
    *,
    max_length: int,
    max_new_tokens: int,
    on_overlap: str,
) -> HeldOut:
    """Read a test set with the tokenizer of the model that is to be tuned.

    elsewhere: source or validation set -> the fingerprints of its rows, none of which is tested on.

    Raises `InputError` for what cannot be read, for rows that also appear elsewhere (if `on_overlap` is "error", or if
    all of them do), and for rows on which exact_match cannot be measured.
    """
    tokenizer = files.load_tokenizer(problem.trust_remote_code)
    template: Template = problem.template
    read = tokenize(
        test,
        tokenizer,
        template=template,
        max_length=max_length,
        cache=default_cache() / "tokens",
        on_bad_row=problem.on_bad_row,
    )
    report_table(f"test set {test.name!r}", read, max_length)
    check_limits(files.build_empty(trust_remote_code=problem.trust_remote_code), {f"test set {test.name!r}": read})
    known = np.isin(read.fingerprints, np.concatenate(list(elsewhere.values())))
    table = read
    if known.any():
        places = [name for name, other in elsewhere.items() if np.isin(read.fingerprints, other).any()]
        first = read.where(int(known.argmax()))
        words = (
            f"{known.sum()} of {len(read)} rows of the test set {test.name!r} (the first: {first}) also appear in "
            f"{', '.join(places)}"
        )
        if on_overlap == "error":
            raise InputError(f"{words}; remove them from either place, or set compare.on_overlap=drop")
        if known.all():
            raise InputError(f"{words}: nothing is left to test on; name a test file with other rows")
        log.warning("%s; they are left out of the test", words)
        table = without_rows(read, read.fingerprints[known].tolist())
    near = {
        name: rows_of_table(other, data)
        for name, other, data in zip(
            elsewhere,
            (*problem.source_tables.values(), *problem.validation_tables.values()),
            (*problem.sources, *problem.validation),
            strict=True,
        )
    }
    report_near_duplicates(f"test set {test.name!r}", near, {test.name: rows_of_table(table, test)})
    questions: list[Question] = []
    if "exact_match" in test.metrics:
        questions = make_questions(rows_of(table, test), tokenizer, template)
        check_room(questions, files.load_config(problem.trust_remote_code), max_new_tokens)
    return HeldOut(test.name, test.metrics, table, int(known.sum()), questions)


def score_model(model: PlacedModel, sets: Sequence[HeldOut], *, max_new_tokens: int) -> ModelScores:
    """This process's part of a model's scores on every test set; see `joined`. All processes call it."""
    scores, written = {}, {}
    for held_out in sets:
        sums: dict[str, NDArray[np.float64]] = {}
        counts: dict[str, NDArray[np.float64]] = {}
        ones = np.ones(len(held_out.table))
        if set(held_out.metrics) - {"exact_match"}:
            found = model.score(held_out.table)
            targets = found.targets.astype(np.float64)
            sums = {
                "loss": found.losses,
                "row_loss": found.losses / targets,
                "token_accuracy": found.correct.astype(np.float64),
            }
            counts = {"loss": targets, "row_loss": ones, "token_accuracy": targets}
        if "exact_match" in held_out.metrics:
            texts = model.answers(held_out.questions, max_new_tokens)
            sums["exact_match"] = exact_matches(held_out.questions, texts).astype(np.float64)
            counts["exact_match"], written[held_out.name] = ones, texts
        scores[held_out.name] = RowScores(sums, counts)
    return ModelScores(scores, written)


def pick_device(name: str | None) -> str:
    """Where models are scored: the backend's device, or this process's GPU if there is one, or else the CPU."""
    if name in (None, "auto"):
        return f"cuda:{local_rank()}" if torch.cuda.is_available() else "cpu"
    return str(name)
