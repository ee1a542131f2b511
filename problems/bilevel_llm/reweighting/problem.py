"""`llm-reweighting`: how much weight does each source of training data deserve, for a given target?

    min_λ  L1(y*(λ))    subject to    y*(λ) in argmin_y  Σ_i p_i(λ) · L2_i(y)

L2_i is the loss on source i, L1 the loss on the validation sets, p(λ) the source weights, y a language model (Pan et al.,
"ScaleBiO", ACL 2025, arXiv 2406.19976). Both are means over rows of a row's mean over its labelled tokens.

Rows of a source may also differ in weight (see `granularity`): the lower loss is then Σ_r p_r · L2_r over the rows of
all sources.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from rich.console import Group
from rich.text import Text
from torch import Tensor, nn

from bilevel import Finding, Forward, InputError, Labels, Loss, Table
from bilevel.account import NextStep, Verdict
from bilevel.distribution import Distribution, logits_of
from bilevel.plain import to_plain
from bilevel.record import Record, average, moving, thinned
from bilevel_llm.data.batches import TokenBatch
from bilevel_llm.data.constant import Constant
from bilevel_llm.data.features import Features, SourceRows, feature_matrix, load_features
from bilevel_llm.data.near_duplicates import report_near_duplicates, rows_of_table
from bilevel_llm.data.overlap import find_overlap
from bilevel_llm.data.settings import Source, ValidationSet, check_sources
from bilevel_llm.data.short_forms import ShortForm
from bilevel_llm.data.tokens import TokenTable
from bilevel_llm.model.language_model import batch_losses
from bilevel_llm.problem import LanguageModelProblem
from bilevel_llm.reweighting.granularity import Granularity, PerSample, PerScorer, PerSource
from bilevel_llm.reweighting.next_steps import next_steps
from bilevel_llm.reweighting.row_report import as_parquet, rarely_drawn
from bilevel_llm.reweighting.row_weights import RowLogits, RowWeights
from bilevel_llm.reweighting.scorer import Scorer, Standardized, describe
from bilevel_llm.reweighting.source_weights import divergence, named_distribution
from bilevel_llm.reweighting.trust import Trust
from bilevel_llm.reweighting.validation_losses import TargetLoss, target_losses, target_table
from bilevel_llm.reweighting.verdict import verdict

if TYPE_CHECKING:
    from rich.console import RenderableType

log = logging.getLogger("bilevel.llm")

MOST_POINTS = 1000  # of a trajectory: enough to draw it; metrics.jsonl has every step

Start = Literal["uniform", "size"] | dict[str, float]


@dataclass
class LLMReweighting(LanguageModelProblem):
    """Learn how much weight the training data deserve: one weight for each source, or for each row.

    Takes the settings of `LanguageModelProblem` too, where `validation` needs at least one set: what the weights serve.

    sources: the sources of training data, at least two. One is enough if its rows may differ in weight. A recipe may write
        {NAME: PATH}.
    granularity: what has a weight of its own: `{per: source}`, `{per: sample}`, or `{per: scorer, features: NAME}`, where
        the weight of a row is a function of its features.
    validation_batch_size: the number of rows in one validation batch; None takes `batch_size`.
    initial: the weights to start from: "uniform", "size" (in proportion to the numbers of rows), or a weight for each
        source. All rows of a source start with the same weight.
    floor: the smallest weight that a source can get.
    prior, prior_strength: adds prior_strength * KL(weights || prior) to the upper loss, a pull that keeps weights from
        collapsing to one source. 0 means none. Where rows have weights, the divergence is over rows, and the prior of a
        source is spread evenly over its rows.
    on_overlap: what to do if validation rows also occur in a source: "report" them, or treat them as an "error".
    tolerance: how precisely the weights must be known to be used: the largest half-width of a 95% interval. With
        `run.steps: auto` the run ends when that is reached.
    """

    sources: Annotated[list[Source], ShortForm(Source, "{NAME: PATH}")]
    _: KW_ONLY
    validation: Annotated[list[ValidationSet], ShortForm(ValidationSet)]
    granularity: Granularity = field(default_factory=PerSource)
    validation_batch_size: int | None = None
    initial: Start = "uniform"
    floor: float = 0.0
    prior: Start = "uniform"
    prior_strength: float = 0.0
    on_overlap: Literal["report", "error"] = "report"
    tolerance: float = 0.1

    labels: ClassVar[Labels] = Labels(
        unit="tokens",
        upper="source",
        lower_loss="training loss",
        upper_loss="validation loss",
        lower_part="source",
        upper_part="set",
    )

    def __post_init__(self) -> None:
        """Check what needs no file."""
        super().__post_init__()
        self._is_prepared = False
        check_sources(self.sources)
        if len(self.sources) < 2 and isinstance(self.granularity, PerSource):
            raise ValueError(
                "sources: at least two are needed; a single source always has all the weight (its rows can differ with "
                "granularity: {per: sample})"
            )
        if not self.validation:
            raise ValueError("validation: at least one set is needed; it says what the weights should serve")
        if not 0 <= self.floor * len(self.sources) < 1:
            raise ValueError(
                f"floor must be at least 0 and below 1/{len(self.sources)} (one over the sources), not {self.floor}"
            )
        if self.prior_strength < 0:
            raise ValueError(f"prior_strength must be at least 0, not {self.prior_strength}")
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance must be between 0 and 1, as weights are, not {self.tolerance}")

    def prepare(self) -> None:
        """Find the model, read and tokenize all data, and check that the two sides do not overlap. Only once."""
        if self._is_prepared:
            return
        _ = self._feature_functions  # a misspelled name is reported before the data are read
        super().prepare()
        _ = self._start
        self._distribution(self.prior, "problem.prior")
        match self.granularity:
            case PerSample() as per_sample:
                per_sample.check(sum(self._sizes))
            case PerScorer():
                log.info("the scorer sees %d features of %d rows", len(self._features[0]), sum(self._sizes))
        overlap = find_overlap(self._train, self._targets)
        if overlap:
            if self.on_overlap == "error":
                raise InputError(f"{overlap}; remove them, or set problem.on_overlap=report")
            log.warning(
                "%s; memorizing them lowers the validation loss (problem.on_overlap=error refuses them)",
                overlap,
            )
        report_near_duplicates(
            "validation data",
            {f"source {source.name!r}": rows_of_table(self._train[source.name], source) for source in self.sources},
            {name: rows_of_table(self._targets[name], v) for name, v in zip(self._targets, self.validation, strict=True)},
        )
        self._is_prepared = True

    def upper(self) -> nn.Module:
        """The weights that the run starts from."""
        match self.granularity:
            case PerSource():
                names = [source.name for source in self.sources]
                prior = self._distribution(self.prior, "problem.prior")
                return Distribution(names, self._start, floor=self.floor, prior=prior)
            case PerSample():
                score: nn.Module = RowLogits(sum(self._sizes))
            case PerScorer(hidden=hidden):
                score = Scorer(torch.from_numpy(self._features[1].values), hidden)
        return RowWeights(score, self._start, self._sizes, self.floor)

    def upper_loss(self, x: Forward, y: Forward, batch: TokenBatch) -> Loss:
        """L1, with the pull to the prior."""
        loss, parts = self.validation_loss(y, batch)
        if self.prior_strength:
            weights = x() if isinstance(self.granularity, PerSource) else x(slice(None))
            loss = loss + batch.share * self.prior_strength * divergence(weights, self._prior.like(weights))
        return loss, parts

    def lower_loss(self, x: Forward, y: Forward, batch: TokenBatch) -> Loss:
        """Σ_i p_i · L2_i, or Σ_r p_r · L2_r.

        A batch holds c_i of a source's n_i rows, each equally likely. A row of it stands for n_i / c_i rows, so that the
        expectation over batches is the sum over all rows.
        """
        losses = batch_losses(y, batch)
        means = batch.means(losses)
        if isinstance(self.granularity, PerSource):
            loss = torch.dot(x().to(means), means)
        else:
            in_mean = batch.weights.to(losses)  # of a target in its source's mean: 1 / c_i / targets of the row
            stands_for = self._rows_of_sources.like(losses) @ in_mean
            loss = (x(batch.rows).to(losses)[batch.row_of_target] * stands_for * losses).sum()
        return loss, dict(zip(self._train, means.detach(), strict=True))

    def summary(self, x: Forward) -> Mapping[str, float]:
        """The weights by source."""
        return dict(zip(self._train, x().tolist(), strict=True))

    def artifacts(self, history: Sequence[Record], facts: Mapping[str, Any]) -> Mapping[str, str]:
        """weights.json, with the trajectory at up to `MOST_POINTS` of the steps, which it names."""
        final, shown = history[-1].upper, thinned(history, MOST_POINTS)
        logits = logits_of(torch.tensor(list(final.values()), dtype=torch.float64), self.floor)
        content = {
            "sources": final,
            "average": average(history),
            "logits": dict(zip(final, logits.tolist(), strict=True)),
            "steps": len(history),
            "granularity": to_plain(self.granularity),
            "targets": {name: asdict(loss) for name, loss in self._target_losses(history).items()},
            "trajectory": {name: [round(record.upper[name], 6) for record in shown] for name in final},
            "trajectory_steps": [record.step for record in shown],
            **facts,
            **self.identity(),
        }
        return {"weights.json": json.dumps(content, indent=1, ensure_ascii=False)}

    def snapshot(self, x: Mapping[str, Tensor]) -> Mapping[str, str | bytes]:
        """sample_weights.parquet, and scorer.json: nothing where weights are those of sources."""
        if isinstance(self.granularity, PerSource):
            return {}
        module = self.upper()
        module.load_state_dict(x)
        with torch.no_grad():
            files: dict[str, str | bytes] = {"sample_weights.parquet": as_parquet(self._train, module(slice(None)))}
        if isinstance(module.score, Scorer):
            files["scorer.json"] = json.dumps(describe(module.score, *self._features), indent=1, ensure_ascii=False)
        return files

    def findings(self, history: Sequence[Record]) -> Sequence[Finding]:
        """Whether to trust the weights."""
        found = list(self._trust(history).findings)
        if isinstance(self.granularity, PerSource):
            return found
        words = "these findings are about the total weight of each source's rows"
        found.append(Finding("by-source", False, words))
        if isinstance(self.granularity, PerSample):
            seldom = rarely_drawn(self._train, self._lower_sampler, len(moving(history)))
            found += [seldom] if seldom else []
        return found

    def verdict(self, history: Sequence[Record]) -> Verdict | None:
        """What to do with the weights."""
        return verdict(self._trust(history), self.tolerance)

    def next_steps(self, history: Sequence[Record]) -> Sequence[NextStep]:
        """How to use the weights, if they are to be used."""
        found = self.verdict(history)
        return next_steps(self, average(history)) if found is not None and found.decision == "use" else []

    def intervals(self, history: Sequence[Record]) -> Mapping[str, tuple[float, float]]:
        """The intervals of the weights, from a solver that goes in rounds."""
        return self._trust(history).intervals

    def tables(self, history: Sequence[Record]) -> Sequence[Table]:
        """How many rows each source has, and how the loss on each validation set changed."""
        losses = self._target_losses(history)
        return [
            Table("Training data", ("source", "rows"), [(name, len(table)) for name, table in self._train.items()]),
            Table(
                "Validation data",
                ("set", "rows", "part of the loss", "loss at first", "loss at last"),
                [(name, len(self._targets[name]), loss.weight, loss.first, loss.last) for name, loss in losses.items()],
            ),
        ]

    def report(self, history: Sequence[Record]) -> RenderableType:
        """The table of weights, and whether to trust them; how each target fared, if there are several."""
        parts: list[RenderableType] = [self._trust(history).table({name: len(table) for name, table in self._train.items()})]
        parts += [Text(f"- {finding.sentence}") for finding in self.findings(history)]
        if len(self._targets) > 1:
            parts += [Text(), target_table(self._target_losses(history))]
        return Group(*parts)

    def _trust(self, history: Sequence[Record]) -> Trust:
        return Trust(history, {name: len(table) for name, table in self._targets.items()})

    def _target_losses(self, history: Sequence[Record]) -> dict[str, TargetLoss]:
        return target_losses(history, dict(zip(self._targets, self._target_weights.value.tolist(), strict=True)))

    @property
    def source_tables(self) -> Mapping[str, TokenTable]:
        """Source -> its rows as tokens."""
        return self._train

    @property
    def source_count(self) -> int:
        """The number of sources in the recipe."""
        return len(self.sources)

    @property
    def validation_rows(self) -> int:
        """The rows of all sets together in one batch."""
        return self.validation_batch_size or self.batch_size

    def identity(self) -> dict[str, Any]:
        """What the weights belong to: the rows and hashes of the data, and the name and hash of the model."""
        return {
            "data": {
                "sources": {name: table.identity for name, table in self._train.items()},
                "validation": {name: table.identity for name, table in self._targets.items()},
            },
            "model": {"name": self.model, "hash": self._files.fingerprint},
        }

    @cached_property
    def _train(self) -> dict[str, TokenTable]:
        return {source.name: self._tokenize(source) for source in self.sources}

    @cached_property
    def _prior(self) -> Constant:
        """The prior over sources, or over rows where these have weights."""
        prior = self._distribution(self.prior, "problem.prior")
        if isinstance(self.granularity, PerSource):
            return Constant(prior)
        sizes = self._rows_of_sources.value
        return Constant((prior / sizes).repeat_interleave(sizes))

    @cached_property
    def _rows_of_sources(self) -> Constant:
        return Constant(torch.tensor(self._sizes))

    @cached_property
    def _start(self) -> Tensor:
        start = self._distribution(self.initial, "problem.initial")
        for name, weight in zip(self._train, start.tolist(), strict=True):
            if weight <= self.floor:
                raise InputError(
                    f"problem.initial starts {name!r} at {weight:.3g}, which is not above problem.floor={self.floor:g}, so "
                    "that it could not move; raise the one or lower the other"
                )
        return start

    @cached_property
    def _sizes(self) -> list[int]:
        return [len(table) for table in self._train.values()]

    @cached_property
    def _features(self) -> tuple[list[str], Standardized]:
        """The names and the values of the features of all rows."""
        rows = [SourceRows(source.name, self._train[source.name], source) for source in self.sources]
        names, values = feature_matrix(self._feature_functions, rows)
        return names, Standardized.of(values)

    @cached_property
    def _feature_functions(self) -> dict[str, Features]:
        return load_features(self.granularity.names) if isinstance(self.granularity, PerScorer) else {}

    def _distribution(self, rule: Start, key: str) -> Tensor:
        rows = [round(len(table) * table.stands_for) for table in self._train.values()]
        return named_distribution(rule, list(self._train), rows, key)
