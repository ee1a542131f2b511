"""What the problems of this package have in common: a language model, sources of training data, and validation sets."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property, partial
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from bilevel import Forward, InputError, Loss, Problem, Shard, Stratified
from bilevel.cost import Cost
from bilevel.data import Stream
from bilevel.problem import Measure
from bilevel.trust import remote_code_is_trusted
from bilevel_llm.data.batches import TokenBatch, micro_batches
from bilevel_llm.data.chat import Template
from bilevel_llm.data.constant import Constant
from bilevel_llm.data.reading import OnBadRow
from bilevel_llm.data.settings import DataSet, ValidationSet, check_set_weights, unique_names
from bilevel_llm.data.short_forms import ShortForm
from bilevel_llm.data.tokens import TokenTable, default_cache, report_table, tokenize
from bilevel_llm.model.cost import full_loss, planned_attention
from bilevel_llm.model.files import ModelFiles, ReadWeight, find_model
from bilevel_llm.model.language_model import LanguageModel, batch_losses
from bilevel_llm.model.limits import check_limits
from bilevel_llm.model.lora import LoRA, read_with_adapters, require_peft
from bilevel_llm.model.quantization import bytes_in_4_bits, how_to_load, keep_weights_as_they_are, require_bitsandbytes
from bilevel_llm.model.suitability import LENGTH, Probe, can_be_packed, probe, probe_packed, require_independent


@dataclass
class LanguageModelProblem(Problem[TokenBatch]):
    """A problem whose lower variable is a language model. A subclass says what it trains on, and with which loss.

    model: a local directory, a GGUF file, a hub id that is already in the local cache, or "smollm2-135m".
    validation: what the upper loss is measured on: the mean of the losses of the sets, weighted by their `weight`. A recipe
        may write a path, a list of paths, each of which is a set, or {NAME: PATH}.
    max_length: the largest number of tokens in a row; longer rows are cut at the end.
    batch_size: the number of rows in one training batch; every source gets an equal part of it.
    template: how turns become text: "auto" takes the model's own chat template where it has one, else "plain".
    lora: train adapters of this kind instead of the model's weights. All replicas of the lower variable then share the
        weights, which never change, so that each further replica takes the memory of its adapters alone.
    on_bad_row: what to do with a row of data that cannot be used: "error" stops; "skip" leaves it out, and says how many
        there were, and which.
    attention: attention implementation of transformers ("eager", "sdpa", "flash_attention_2"); None lets it choose.
    trust_remote_code: whether the model's directory brings code that has to be run. That is refused unless the command line
        allows it too (`--trust-remote-code`; see `bilevel.trust`), which sets this.

    Paths are relative to the working directory.
    """

    model: str
    _: KW_ONLY
    validation: Annotated[list[ValidationSet], ShortForm(ValidationSet)] = field(default_factory=list)
    max_length: int = 1024
    batch_size: int = 16
    template: Template = "auto"
    lora: LoRA | None = None
    on_bad_row: OnBadRow = "error"
    attention: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Check the settings that need no file to be checked."""
        asked = "problem.trust_remote_code" if self.trust_remote_code else None
        self.trust_remote_code = remote_code_is_trusted(asked_by=asked)
        if self.max_length < 2:
            raise ValueError(f"max_length must be at least 2, not {self.max_length}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}")
        check_set_weights(self.validation)
        self.packed = False  # until `examine` has seen that the model can take it

    @property
    @abstractmethod
    def source_tables(self) -> Mapping[str, TokenTable]:
        """Source -> its rows as tokens."""

    @property
    @abstractmethod
    def source_count(self) -> int:
        """How many sources there are. Reads no data."""

    @property
    @abstractmethod
    def validation_rows(self) -> int:
        """The largest number of rows in one validation batch. Reads no data."""

    @property
    def _tables(self) -> list[TokenTable]:
        """All tables: those of the sources, then those of the validation sets."""
        return [*self.source_tables.values(), *self._targets.values()]

    @property
    def validation_tables(self) -> Mapping[str, TokenTable]:
        """Validation set -> its rows as tokens."""
        return self._targets

    def prepare(self) -> None:
        """Find the model, read and tokenize all data, log what was read, and check that model and batches can take it."""
        if self.lora is not None:
            require_peft()
            if self.lora.quantize is not None:
                require_bitsandbytes()
        read = {
            f"{kind} {name!r}": table
            for kind, tables in (("source", self.source_tables), ("validation set", self._targets))
            for name, table in tables.items()
        }
        for name, table in read.items():
            report_table(name, table, self.max_length)
        check_limits(self._files.build_empty(planned_attention(self.attention), self.trust_remote_code), read)
        _check_rows(self.source_tables, self._lower_sampler)
        if self.validation:
            _check_rows(self._targets, self._upper_sampler)

    def fingerprint(self) -> str:
        """The hash of the model's files, of the data files, and of the rows that are used, as the model is given them.

        The last changes with whatever changes tokens or labels: the tokenizer, its chat template, or the library.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(self._files.fingerprint.encode())
        for table in self._tables:
            digest.update(f"{table.content_hash}:{table.training_hash};".encode())
        return digest.hexdigest()

    def lower(self) -> nn.Module:
        """The language model; its weights are left in their files where the backend will read them one by one."""
        settings = (self.attention, self.trust_remote_code)
        if self.lora is None or self.lora.quantize is None:
            return self._as_trained(*self._files.load(*settings))
        model = self._files.load_model(*settings, how_to_load())
        keep_weights_as_they_are(model)
        return self._as_trained(model, None)

    def examine(self, measure: Measure) -> None:
        """The model must be causal, and must treat the rows of a batch one by one; see whether it can take packed rows."""
        # the configuration of code that came with the model may hide what changes in long rows
        longest = max(int(table.lengths.max()) for table in self._tables) if self.trust_remote_code else 0
        batch = Probe.of(self._tokenizer, max(LENGTH, longest))
        require_independent(measure(probe, batch))
        self.packed = can_be_packed(measure(probe_packed, batch))

    def validation_loss(self, y: Forward, batch: TokenBatch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """A micro-batch's part of the weighted mean over validation sets, and of the mean of each."""
        losses = batch.means(batch_losses(y, batch))
        weighted = torch.dot(self._target_weights.like(losses), losses)
        return weighted, dict(zip(self._targets, losses.detach(), strict=True))

    def upper_loss(self, x: Forward, y: Forward, batch: TokenBatch) -> Loss:
        """The weighted mean over validation sets."""
        return self.validation_loss(y, batch)

    def upper_batch(self, index: int, shard: Shard) -> Sequence[TokenBatch]:
        """Rows of every validation set; none if there is no set."""
        return self._micro_batches(self._targets, self._upper_sampler, index, shard) if self.validation else []

    def lower_batch(self, index: int, shard: Shard) -> Sequence[TokenBatch]:
        """Rows of every source."""
        return self._micro_batches(self.source_tables, self._lower_sampler, index, shard)

    def lower_rows(self, index: int, seed: int) -> list[tuple[int, int]]:
        """The rows of lower batch number `index`, over all processes, as (number of the source, row)."""
        return self._lower_sampler.batch(index, seed)

    def cost(self, labelled_share: float = 1.0) -> Cost:
        """A pass over rows of max_length tokens. Needs the model's config.json, neither weights nor data."""
        if not 0 < labelled_share <= 1:
            raise InputError(f"the labelled share is a part of the tokens, above 0 and at most 1, not {labelled_share}")
        files = find_model(self.model, weights=False)

        def build() -> LanguageModel:
            with torch.device("meta"):
                return self._as_trained(files.build_empty(planned_attention(self.attention), self.trust_remote_code), None)

        def packed(module: nn.Module) -> Mapping[str, float]:
            quantized = self.lora is not None and self.lora.quantize is not None
            return bytes_in_4_bits(module) if quantized else {}

        return Cost(
            build=build,
            blocks=self.blocks,
            loss=partial(full_loss, length=self.max_length, sources=self.source_count, labelled_share=labelled_share),
            lower_rows=self.batch_size,
            upper_rows=self.validation_rows,
            row_size=self.max_length,
            unit="tokens",
            savings=("a smaller model (problem.model)", "shorter rows (problem.max_length)"),
            packed=packed,
        )

    def _as_trained(self, model: Any, read: ReadWeight | None) -> LanguageModel:
        """The lower module, made of a causal LM: with adapters, if they are asked for.

        read: how to read its weights, if it was built without them.
        """
        if self.lora is not None:
            model = self.lora.wrap(model)
            read = None if read is None else read_with_adapters(model, read)
        return LanguageModel(model, read)

    def _micro_batches(
        self, tables: Mapping[str, TokenTable], sampler: Stratified, index: int, shard: Shard
    ) -> Sequence[TokenBatch]:
        """Batch `index` of the sampler over these tables, with weights by which a table's losses give its mean."""
        return micro_batches(list(tables.values()), sampler, index, shard, packed=self.packed)

    def _tokenize(self, data: DataSet) -> TokenTable:
        return tokenize(
            data,
            self._tokenizer,
            template=self.template,
            max_length=self.max_length,
            cache=default_cache() / "tokens",
            on_bad_row=self.on_bad_row,
        )

    @cached_property
    def _files(self) -> ModelFiles:
        return find_model(self.model)

    @cached_property
    def _tokenizer(self) -> Any:
        return self._files.load_tokenizer(self.trust_remote_code)

    @cached_property
    def _targets(self) -> dict[str, TokenTable]:
        names = unique_names(self.validation)
        return {name: self._tokenize(v) for name, v in zip(names, self.validation, strict=True)}

    @cached_property
    def _target_weights(self) -> Constant:
        weights = torch.tensor([target.weight for target in self.validation])
        return Constant(weights / weights.sum())

    @cached_property
    def _lower_sampler(self) -> Stratified:
        return Stratified(tuple(map(len, self.source_tables.values())), self.batch_size, Stream.LOWER)

    @cached_property
    def _upper_sampler(self) -> Stratified:
        return Stratified(tuple(map(len, self._targets.values())), self.validation_rows, Stream.UPPER)


def _check_rows(tables: Mapping[str, TokenTable], sampler: Stratified) -> None:
    """A batch must not need the same row twice."""
    needed = -(-sampler.batch_size // len(sampler.sizes))
    for name, table in tables.items():
        if len(table) < needed:
            raise InputError(
                f"{name!r} has {len(table)} usable rows, and a batch of {sampler.batch_size} needs {needed} of it; "
                "add rows or lower the batch size"
            )
