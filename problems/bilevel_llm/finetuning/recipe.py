"""What the options of `bilevel finetune` mean, as a recipe."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bilevel import InputError
from bilevel.config import Config, load_config
from bilevel.plugins import Plugins
from bilevel.recipe import Recipe
from bilevel.schedule import at
from bilevel.suggest import did_you_mean

PROBLEM = "llm-finetuning"
WARMUP = 0.03  # of all steps: Adam's second moments need a few dozen gradients before they can be trusted

EVALUATIONS = 10  # in a run: enough to see where the validation loss turns

METHODS: Mapping[str, Mapping[str, Any]] = {
    "full": {"active": {"name": "all"}, "problem.lora": None},
    "lisa": {
        # embedding, head and norm train all the time, as in the LISA paper: this is a model to ship
        "active": {"name": "lisa", "blocks": 2, "period": 5, "embedding": "train", "head": "train", "rest": "train"},
        "problem.lora": None,
    },
    "lora": {"active": {"name": "all"}, "problem.lora": {}},
}
"""Method -> what it sets in a recipe."""

LR, ADAPTER_LR = 1e-5, 1e-4
"""Where to begin with models of 1 to 10 billion parameters; smaller models bear larger steps. Adapters start at 0, and need
about ten times the step of the weights."""


@dataclasses.dataclass(frozen=True)
class Length:
    """How long to train: one of the three; none of them leaves it to the recipe, or else is one epoch."""

    epochs: float | None = None
    steps: int | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        if len(given) > 1:
            raise InputError(f"--{' and --'.join(given)} are given; give one of them")
        for name, value in given.items():
            if value <= 0:
                raise InputError(f"--{name} is {value}; it must be positive")


def finetune_config(
    base: Path | None,
    plugins: Plugins,
    *,
    settings: Mapping[str, Any],
    method: str | None = None,
    lr: float | None = None,
    length: Length,
    changes: Sequence[str] = (),
) -> Config:
    """The run that a recipe and options describe; see `finetune_recipe`, and `Length`.

    Raises `InputError` for options that cannot be used, and for data that cannot be read where it decides the length.
    """
    recipe = finetune_recipe(base, settings=settings, method=method, lr=lr, changes=changes)
    return with_length(recipe, plugins, lr=lr, length=length)


def finetune_recipe(
    base: Path | None,
    *,
    settings: Mapping[str, Any],
    method: str | None = None,
    lr: float | None = None,
    changes: Sequence[str] = (),
) -> Recipe:
    """A recipe with what options say. Options stand above the recipe, and `changes` (`--set`) above both. No data is read.

    base: a recipe of the problem `llm-finetuning`; None starts from nothing.
    settings: dotted key -> value; None leaves it to the recipe, or else the default.
    method: one of METHODS; None leaves it to the recipe, or else is "full".
    lr: the peak of a cosine that rises over the first 3% of the steps.

    Raises `InputError` for options that cannot be used.
    """
    recipe = Recipe({}, {}, "bilevel finetune") if base is None else Recipe.read(base)
    if (_get(recipe, "problem.name") or PROBLEM) != PROBLEM:
        name = _get(recipe, "problem.name")
        raise InputError(f"{base} is a recipe of the problem {name!r}; `bilevel run` does what it says")
    if lr is not None and lr <= 0:
        raise InputError(f"--lr is {lr}; it must be positive")
    options = {**settings, **({} if method is None else _method(method))}
    for key, value in options.items():
        if value is not None or key == "problem.lora":
            _put(recipe, key, value)
    for change in changes:
        recipe.set(change)
    for key, value in (
        ("problem.name", PROBLEM),
        ("solver.name", "descent"),
        ("backend.name", "torch"),
        ("backend.micro_batch_size", 4),  # bounds memory; the result does not depend on it
    ):
        if _get(recipe, key) is None:
            _put(recipe, key, value)
    for key, option in (("problem.model", "--model"), ("problem.data", "--data"), ("run.output", "--output")):
        if _get(recipe, key) is None:
            raise InputError(f"{option} is missing (in a recipe: {key})")
    return recipe


def output_of(recipe: Recipe) -> Path:
    """The directory of the run."""
    return Path(str(_get(recipe, "run.output")))


def with_length(recipe: Recipe, plugins: Plugins, *, lr: float | None, length: Length) -> Config:
    """The run of such a recipe, with as many steps, and a schedule as long, as `length` says.

    Raises `InputError` for what cannot be used, and for data that cannot be read where it decides the length.
    """
    if lr is None and _get(recipe, "solver.lr") is None:
        lr = LR if _get(recipe, "problem.lora") is None else ADAPTER_LR
    evaluate = _get(recipe, "solver.evaluate_every") is None

    def build(steps: int) -> Config:
        _put(recipe, "run.steps", steps)
        if not (isinstance(steps, int) and steps > 0):
            return load_config(recipe, plugins)  # it says what is wrong
        if lr is not None:
            warmup = min(round(WARMUP * steps), steps - 1)
            _put(recipe, "solver.lr", {"name": "cosine", "peak": lr, "steps": steps, "warmup": warmup})
        if evaluate:
            _put(recipe, "solver.evaluate_every", -(-steps // EVALUATIONS))
        return load_config(recipe, plugins)

    steps = length.steps or (_get(recipe, "run.steps") if length == Length() else None)
    if steps is not None:
        config = build(steps)
    else:  # the data must tell
        problem: Any = build(1).problem
        seed = _get(recipe, "run.seed") or 0
        steps = problem.steps(epochs=None if length.tokens else length.epochs or 1.0, tokens=length.tokens, seed=seed)
        config = dataclasses.replace(build(steps), problem=problem)  # which has read its data already
    _check_schedule(config)
    return config


def _check_schedule(config: Config) -> None:
    """Raises `InputError` if the last steps would not move: the schedule is that of a shorter run."""
    schedule = getattr(config.solver, "lr", None)
    try:
        still = schedule is not None and at(schedule, config.run.limit - 1) == 0
    except ValueError as error:
        raise InputError(f"solver.lr: {error}") from error
    if still:
        raise InputError(
            f"solver.lr is 0 at the end of {config.run.limit} steps: its schedule is made for fewer; start a new run that "
            "long, or use a constant step size for runs to be extended"
        )


def _method(name: str) -> Mapping[str, Any]:
    if name not in METHODS:
        raise InputError(f"--method {name}: there is no such method{did_you_mean(name, METHODS)}")
    return METHODS[name]


def _put(recipe: Recipe, key: str, value: Any) -> None:
    recipe.put(key, copy.deepcopy(value), f"{recipe.where(key.split('.'))}")


def _get(recipe: Recipe, key: str) -> Any:
    node: Any = recipe.tree
    for step in key.split("."):
        node = node.get(step) if isinstance(node, dict) else None
    return node
