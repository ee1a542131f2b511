"""The section `compare` of a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import Annotated, Any, ClassVar, Literal, get_args

from bilevel.active import LISA
from bilevel.plain import RECIPE_RULES
from bilevel_llm.data.registered_formats import FormatName
from bilevel_llm.data.settings import DataSet
from bilevel_llm.data.short_forms import ShortForm
from bilevel_llm.mixing.draw import MAX_REPEATS
from bilevel_llm.mixing.mix import AS_THEY_ARE, MixFormat
from bilevel_llm.model.lora import LoRA

Metric = Literal["loss", "row_loss", "perplexity", "token_accuracy", "exact_match"]
LEARNED, BASE, SINGLE = "learned", "base", "single-sources"
"""The names of the recipe's own bilevel run; of the model as it is, which is scored too; and of each source by itself."""

LONGEST = 180  # bytes of a name that becomes part of a file's name: of 255 that file systems take, the rest is ours


@dataclass(frozen=True)
class TestSet(DataSet):
    """One set of held-out rows. See `DataSet` for its other fields.

    metrics: what is measured. "loss" (nats) and "perplexity" are means over answer tokens, "row_loss" the mean over rows of
        each row's mean, which is what the weights are learned for; "token_accuracy" is the share of answer tokens that are
        the model's first choice; "exact_match" is the share of rows whose generated final answer is that of the row (see
        `answers`), which takes one generation per row.
    """

    __pydantic_config__: ClassVar[Mapping[str, Any]] = RECIPE_RULES

    path: str | list[str]
    name: str = "test"
    format: FormatName | None = None
    metrics: tuple[Metric, ...] = ("loss", "row_loss", "perplexity", "token_accuracy")
    _: KW_ONLY
    fields: dict[str, str] | None = None
    max_rows: int | None = None
    sample_seed: int | None = None
    split: str | None = None
    subset: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.name or any(sign in self.name for sign in "/\\\0"):
            raise ValueError(f"name: {self.name!r} cannot be part of a file's name")
        if len(self.name.encode()) > LONGEST:
            raise ValueError(f"name: longer than {LONGEST} bytes, which is too long to be part of a file's name")
        if not self.metrics:
            raise ValueError(f"metrics: name at least one of {', '.join(get_args(Metric))}")


@dataclass(frozen=True)
class FineTune:
    """How the model is trained on every mix, in the same way for all methods; see `bilevel finetune`.

    epochs, steps, tokens: how long to train; give at most one of the three. None of them: one epoch. For mixes whose size is
        given in tokens, an epoch is that number of tokens.
    max_length: length in tokens at which training and test rows are cut. None: that of the problem.
    active: settings of the method "lisa" that differ from its defaults, as in {blocks: 4}.
    lora: likewise for the method "lora", as in {rank: 8}.
    """

    __pydantic_config__: ClassVar[Mapping[str, Any]] = RECIPE_RULES

    method: Literal["full", "lisa", "lora"] = "full"
    lr: float | None = None
    epochs: float | None = None
    steps: int | None = None
    tokens: int | None = None
    batch_size: int = 16
    max_length: int | None = None
    mean_over: Literal["rows", "tokens"] = "rows"
    active: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("epochs", "steps", "tokens") if getattr(self, name) is not None}
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given; give one of them")
        for name, method, kind in (("active", "lisa", LISA), ("lora", "lora", LoRA)):
            keys = getattr(self, name)
            if keys and self.method != method:
                raise ValueError(f"{name} is for the method {method!r}, and the method is {self.method!r}")
            if unknown := sorted(set(keys) - {f.name for f in fields(kind)}):
                raise ValueError(f"{name} has no key {unknown[0]!r}; known: {', '.join(f.name for f in fields(kind))}")
        for name, value in {**given, "lr": self.lr, "batch_size": self.batch_size}.items():
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, not {value}")


@dataclass(frozen=True)
class CompareSettings:
    """What is compared, and on what.

    methods: each is "learned" (the bilevel run of this recipe; with `solver`, `active` or `steps` it takes these in place of
        the recipe's), a registered baseline ("uniform", or {name: temperature, temperature: 2}), weights by hand
        ({name: mine, weights: {a: 3, b: 1}}), the weights of a run ({name: earlier, run: runs/a}, in which `{seed}` stands
        for the seed), or "single-sources": a method for each source, which has all the weight. `label` is what an entry is
        called in the tables.
    seeds: everything is done anew for each seed: the weights (if they depend on it), the mix and the training.
    fresh_rows: each seed also has a sample of its own of every source and validation set that has `max_rows`. Seeds that
        share their rows say how much luck there is in training; only fresh rows say how much there is in the data.
    rows, tokens: size of every mix; give one of the two.
    test: the held-out sets. A recipe may write a path, a list of paths, each of which is a set, or {NAME: PATH}.
    reference: the method that the others are compared with, or several of them. None: "uniform" if it is among the methods,
        or else the first.
    model: the model that is tuned. None: that of the problem. Another one shows whether weights carry over to it.
    max_repeats: the largest number of copies of a row in a mix.
    on_shortfall: what to do if a source has fewer rows than its weight asks for: take more rows of the others, so that
        budgets stay equal, and say so ("redistribute"), or refuse ("error").
    format: format of the mix; "messages" if the sources differ in format.
    on_overlap: what to do with test rows that also appear in the sources or in the validation data: leave them out of the
        test ("drop"), or refuse ("error").
    max_new_tokens: the largest length of a generated answer, in tokens.
    """

    __pydantic_config__: ClassVar[Mapping[str, Any]] = RECIPE_RULES

    methods: list[str | dict[str, Any]]
    seeds: list[int]
    test: Annotated[list[TestSet], ShortForm(TestSet)]
    rows: int | None = None
    tokens: int | None = None
    finetune: FineTune = field(default_factory=FineTune)
    reference: str | list[str] | None = None
    model: str | None = None
    fresh_rows: bool = False
    max_repeats: int = MAX_REPEATS
    on_shortfall: Literal["redistribute", "error"] = "redistribute"
    format: MixFormat = AS_THEY_ARE
    on_overlap: Literal["drop", "error"] = "drop"
    max_new_tokens: int = 400

    def __post_init__(self) -> None:
        if not self.methods:
            raise ValueError("methods: name at least one, as in [uniform, learned]")
        if not self.seeds:
            raise ValueError("seeds: name at least one; three or more tell luck from merit")
        if not self.test:
            raise ValueError("test: name at least one held-out set")
        if (self.rows is None) == (self.tokens is None):
            raise ValueError(
                "give the size of the mixes in rows or in tokens, and not both: it is the same for every method"
            )
        for name in ("rows", "tokens", "max_repeats", "max_new_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if any(seed < 0 for seed in self.seeds):
            raise ValueError("seeds: they must not be negative")
        _once("seeds", self.seeds)
        _once("test: the name", [test.name for test in self.test])


def label_of(entry: str | Mapping[str, Any]) -> str:
    """What an entry of `methods` is called in the tables."""
    return entry if isinstance(entry, str) else str(entry.get("label", entry.get("name", "")))


def _once(what: str, values: Sequence[Any]) -> None:
    for position, value in enumerate(values):
        if value in values[:position]:
            raise ValueError(f"{what} {value!r} is given twice")
