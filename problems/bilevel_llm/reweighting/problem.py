"""`llm-reweighting`: how much weight does each source of training data deserve, for a given target?

    min_λ  L1(y*(λ))    subject to    y*(λ) in argmin_y  Σ_i p_i(λ) · L2_i(y)

L2_i is the loss on source i, L1 the loss on the validation sets, p(λ) the source weights, y a language model (Pan et al.,
"ScaleBiO", ACL 2025, arXiv 2406.19976). Both are means over rows of a row's mean over its labelled tokens.

Rows of a source may also differ in weight (see `granularity`): the lower loss is then Σ_r p_r · L2_r over the rows of
all sources.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.console import Group
from rich.text import Text
from torch import Tensor, nn

from bilevel import Forward, InputError, Loss, Problem, Shard, Stratified
from bilevel.cost import Cost
from bilevel.data import Stream
from bilevel.plain import to_plain
from bilevel.problem import Record, may_be_memoryless
from bilevel_llm.data.batches import TokenBatch, micro_batches
from bilevel_llm.data.features import Features, SourceRows, feature_matrix, load_features
from bilevel_llm.data.overlap import find_overlap
from bilevel_llm.data.settings import Source, ValidationSet, check_set_weights, check_sources, unique_names
from bilevel_llm.data.tokens import TokenTable, default_cache, report_table, tokenise
from bilevel_llm.model.cost import full_loss, planned_attention
from bilevel_llm.model.files import ModelFiles, find_model
from bilevel_llm.model.language_model import LanguageModel, token_losses
from bilevel_llm.reweighting.granularity import Granularity, PerSample, PerScorer, PerSource
from bilevel_llm.reweighting.resampling import TargetRows
from bilevel_llm.reweighting.row_report import as_parquet, rarely_drawn
from bilevel_llm.reweighting.row_weights import RowLogits, RowWeights
from bilevel_llm.reweighting.scorer import Scorer, Standardised, describe
from bilevel_llm.reweighting.source_weights import SourceWeights, divergence, logits_of, named_distribution
from bilevel_llm.reweighting.trust import Trust
from bilevel_llm.reweighting.validation_losses import TargetLoss, target_losses, target_table

if TYPE_CHECKING:
    from rich.console import RenderableType

log = logging.getLogger("bilevel.llm")

Start = Literal["uniform", "size"] | dict[str, float]


@dataclass
class LLMReweighting(Problem[TokenBatch]):
    """Learn how much weight the training data deserve: one weight for each source, or for each row.

    model: a local directory, a GGUF file, a hub id that is already in the local cache, or "smollm2-135m".
    sources: at least two; one is enough if its rows may differ in weight.
    validation: the target; at least one set. The upper loss is the mean of their losses, weighted by their `weight`.
    granularity: what has a weight of its own: `{per: source}`, `{per: sample}`, or `{per: scorer, features: NAME}`, where
        the weight of a row is a function of its features.
    max_length: tokens of a row; longer rows are cut at the end.
    batch_size: rows of one training batch; every source gets an equal part of it.
    validation_batch_size: rows of one validation batch; None takes batch_size.
    initial: weights to start from: "uniform", "size" (in proportion to rows) or a weight for each source. The rows of a
        source start alike.
    floor: smallest weight a source can get.
    prior, prior_strength: adds prior_strength * KL(weights || prior) to the upper loss, a pull that keeps weights from
        collapsing to one source. 0: none. Where rows have weights, the divergence is that of rows, the prior spread evenly
        over those of a source.
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
    granularity: Granularity = field(default_factory=PerSource)

    def __post_init__(self) -> None:
        """Check what needs no file."""
        self._is_prepared = False
        names = [source.name for source in self.sources]
        check_sources(self.sources)
        if len(names) < 2 and isinstance(self.granularity, PerSource):
            raise ValueError(
                "sources: at least two are needed; a single source always has all the weight (its rows can differ with "
                "granularity: {per: sample})"
            )
        if not self.validation:
            raise ValueError("validation: at least one set is needed; it says what the weights should serve")
        if self.max_length < 2:
            raise ValueError(f"max_length must be at least 2, not {self.max_length}")
        if not 0 <= self.floor * len(names) < 1:
            raise ValueError(f"floor must be at least 0 and below 1/{len(names)} (one over the sources), not {self.floor}")
        if self.prior_strength < 0:
            raise ValueError(f"prior_strength must be at least 0, not {self.prior_strength}")
        check_set_weights(self.validation)

    def prepare(self) -> None:
        """Find the model, read and tokenise all data, and check that the two sides do not overlap. Only once."""
        if self._is_prepared:
            return
        _ = self._feature_functions  # a misspelt name is said before the data are read
        for kind, tables in (("source", self._train), ("validation set", self._targets)):
            for name, table in tables.items():
                report_table(f"{kind} {name!r}", table, self.max_length)
        _ = self._start
        self._distribution(self.prior, "problem.prior")
        self._check_granularity()
        _check_rows(self._train, self._lower_sampler)
        _check_rows(self._targets, self._upper_sampler)
        overlap = find_overlap(self._train, self._targets)
        if overlap:
            if self.on_overlap == "error":
                raise InputError(f"{overlap}; remove them, or set problem.on_overlap=report")
            log.warning("%s; their loss can be lowered by heart (problem.on_overlap=error refuses this)", overlap)
        self._is_prepared = True

    def fingerprint(self) -> str:
        """Of the token tables and the model's files."""
        tables = [table.content_hash for side in (self._train, self._targets) for table in side.values()]
        return hashlib.sha256(" ".join([*tables, self._files.fingerprint]).encode()).hexdigest()

    def upper(self) -> nn.Module:
        """The weights at their start."""
        match self.granularity:
            case PerSource():
                return SourceWeights(self._start, self.floor)
            case PerSample():
                score: nn.Module = RowLogits(sum(self._sizes))
            case PerScorer(hidden=hidden):
                score = Scorer(torch.from_numpy(self._features[1].values), hidden)
        return RowWeights(score, self._start, self._sizes, self.floor)

    def lower(self) -> nn.Module:
        """The language model."""
        if may_be_memoryless():
            return LanguageModel(*self._files.load_skeleton(self.attention, self.trust_remote_code))
        return LanguageModel(self._files.load_model(self.attention, self.trust_remote_code))

    def upper_loss(self, x: Forward, y: Forward, batch: TokenBatch) -> Loss:
        """L1, with the pull to the prior."""
        losses = _means(_losses(y, batch), batch)
        loss = torch.dot(self._target_weights.to(losses), losses)
        if self.prior_strength:
            weights = x() if isinstance(self.granularity, PerSource) else x(slice(None))
            loss = loss + batch.share * self.prior_strength * divergence(weights, self._prior.to(weights))
        return loss, dict(zip(self._targets, losses.detach(), strict=True))

    def lower_loss(self, x: Forward, y: Forward, batch: TokenBatch) -> Loss:
        """Σ_i p_i · L2_i, or Σ_r p_r · L2_r.

        A batch holds c_i of a source's n_i rows, each equally likely. A row of it stands for n_i / c_i rows, so that the
        expectation over batches is the sum over all rows.
        """
        losses = _losses(y, batch)
        means = _means(losses, batch)
        if isinstance(self.granularity, PerSource):
            loss = torch.dot(x().to(means), means)
        else:
            in_mean = batch.weights.to(losses)  # of a target in its source's mean: 1 / c_i / targets of the row
            stands_for = torch.tensor(self._sizes).to(losses) @ in_mean
            loss = (x(batch.rows).to(losses)[batch.row_of_target] * stands_for * losses).sum()
        return loss, dict(zip(self._train, means.detach(), strict=True))

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
        trust = self._trust(history)
        final = history[-1]["upper"]
        logits = logits_of(torch.tensor(list(final.values()), dtype=torch.float64), self.floor)
        content = {
            "sources": final,
            "average": trust.average,
            "logits": dict(zip(final, logits.tolist(), strict=True)),
            "steps": len(history),
            "trust": self._verdicts(trust, history),
            "flags": trust.flags(),
            "granularity": to_plain(self.granularity),
            "targets": {name: asdict(loss) for name, loss in self._target_losses(history).items()},
            "trajectory": {name: [round(record["upper"][name], 6) for record in history] for name in final},
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

    def report(self, history: Sequence[Record]) -> RenderableType:
        """The table of weights, and whether to trust them; how each target fared, if there are several."""
        parts: list[RenderableType] = [self._trust(history).table({name: len(table) for name, table in self._train.items()})]
        parts += [Text(f"- {warning}") for warning in self._row_warnings(history)]
        if len(self._targets) > 1:
            parts += [Text(), target_table(self._target_losses(history))]
        return Group(*parts)

    def _trust(self, history: Sequence[Record]) -> Trust:
        return Trust(history, self._target_rows)

    def _verdicts(self, trust: Trust, history: Sequence[Record]) -> list[str]:
        return [*trust.verdicts(), *self._row_warnings(history)]

    def _row_warnings(self, history: Sequence[Record]) -> list[str]:
        if isinstance(self.granularity, PerSource):
            return []
        moving = sum(1 for record in history if "gap" in record)
        seldom = rarely_drawn(self._train, self._lower_sampler, moving) if isinstance(self.granularity, PerSample) else None
        return ["the lines above are about what each source's rows weigh together", *([seldom] if seldom else [])]

    def _target_losses(self, history: Sequence[Record]) -> dict[str, TargetLoss]:
        return target_losses(history, dict(zip(self._targets, self._target_weights.tolist(), strict=True)))

    @property
    def source_tables(self) -> Mapping[str, TokenTable]:
        """Source -> its rows as tokens."""
        return self._train

    @property
    def validation_tables(self) -> Mapping[str, TokenTable]:
        """Validation set -> its rows as tokens."""
        return self._targets

    def lower_rows(self, index: int, seed: int) -> list[tuple[int, int]]:
        """The rows of lower batch number `index`, over all processes, as (number of the source, row)."""
        return self._lower_sampler.batch(index, seed)

    def identity(self) -> dict[str, Any]:
        """What the weights are about: rows and hashes of the data, name and hash of the model."""
        return {
            "data": {"sources": _identity(self._train), "validation": _identity(self._targets)},
            "model": {"name": self.model, "hash": self._files.fingerprint},
        }

    @cached_property
    def _files(self) -> ModelFiles:
        return find_model(self.model)

    @cached_property
    def _train(self) -> dict[str, TokenTable]:
        return {source.name: self._tokenise(source) for source in self.sources}

    @cached_property
    def _targets(self) -> dict[str, TokenTable]:
        return {name: self._tokenise(s) for name, s in zip(unique_names(self.validation), self.validation, strict=True)}

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

    @property
    def _target_rows(self) -> TargetRows:
        each = self._upper_sampler.batch_size / len(self._targets)
        parts = dict(zip(self._targets, self._target_weights.tolist(), strict=True))
        return TargetRows({name: len(table) for name, table in self._targets.items()}, dict.fromkeys(parts, each), parts)

    @cached_property
    def _prior(self) -> Tensor:
        """Of sources, or of rows."""
        prior = self._distribution(self.prior, "problem.prior")
        if isinstance(self.granularity, PerSource):
            return prior
        sizes = torch.tensor(self._sizes)
        return (prior / sizes).repeat_interleave(sizes)

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
    def _features(self) -> tuple[list[str], Standardised]:
        """Names and values of the features of all rows."""
        rows = [SourceRows(source.name, self._train[source.name], source.format) for source in self.sources]
        names, values = feature_matrix(self._feature_functions, rows)
        return names, Standardised.of(values)

    @cached_property
    def _feature_functions(self) -> dict[str, Features]:
        return load_features(self.granularity.names) if isinstance(self.granularity, PerScorer) else {}

    @cached_property
    def _target_weights(self) -> Tensor:
        weights = torch.tensor([target.weight for target in self.validation])
        return weights / weights.sum()

    def _distribution(self, rule: Start, key: str) -> Tensor:
        return named_distribution(rule, list(self._train), self._sizes, key)

    def _check_granularity(self) -> None:
        rows = sum(self._sizes)
        if isinstance(self.granularity, PerSample) and rows > self.granularity.max_rows:
            raise InputError(
                f"problem.granularity: one weight for each of {rows:,} rows takes {72 * rows / 1e6:,.0f} MB, and a softmax "
                "over all of them in every forward; take {per: scorer}, fewer rows, or raise problem.granularity.max_rows "
                f"({self.granularity.max_rows:,})"
            )
        if isinstance(self.granularity, PerScorer):
            names, _ = self._features
            log.info("the scorer sees %d features of %d rows", len(names), rows)

    def _tokenise(self, data: Source | ValidationSet) -> TokenTable:
        return tokenise(
            data.patterns,
            self._tokenizer,
            format=data.format,
            template=self.template,
            max_length=self.max_length,
            cache=default_cache() / "tokens",
        )


def _losses(y: Forward, batch: TokenBatch) -> Tensor:
    """The loss of every target. Shape: (targets,).

    To be summed in float64 (where the device has it): what moves the weights is a small difference of such sums.
    """
    losses = token_losses(y(batch.ids, batch.positions), batch.targets)
    return losses.to(torch.float32 if losses.device.type == "mps" else torch.float64)


def _means(losses: Tensor, batch: TokenBatch) -> Tensor:
    """This micro-batch's part of the mean loss of every source. Shapes: (targets,) -> (sources,)."""
    return batch.weights.to(losses) @ losses


def _identity(tables: Mapping[str, TokenTable]) -> dict[str, dict[str, Any]]:
    return {name: {"rows": len(table), "hash": table.content_hash} for name, table in tables.items()}


def _check_rows(tables: Mapping[str, TokenTable], sampler: Stratified) -> None:
    """A batch must not need the same row twice."""
    needed = -(-sampler.batch_size // len(sampler.sizes))
    for name, table in tables.items():
        if len(table) < needed:
            raise InputError(
                f"{name!r} has {len(table)} usable rows, and a batch of {sampler.batch_size} needs {needed} of it; "
                "add rows or lower the batch size"
            )
