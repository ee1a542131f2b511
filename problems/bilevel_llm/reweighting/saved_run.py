"""A saved reweighting run as a mix needs it: its problem, its weights, and whether its data have changed since."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilevel import documents
from bilevel.account import Finding
from bilevel.config import build_section
from bilevel.errors import InputError
from bilevel.recipe import Recipe
from bilevel.run_directory import RunDirectory
from bilevel.run_reader import resolved_recipe
from bilevel.suggest import did_you_mean

if TYPE_CHECKING:
    from bilevel.plugins import Plugins
    from bilevel.working_directory import Place
    from bilevel_llm.reweighting.problem import LLMReweighting

LARGEST = 1e100
"""Of a weight in a file. Only ratios matter; the sum of larger numbers could overflow."""

KINDS: Mapping[str, str] = {"average": "average", "final": "sources"}
"""What the weights of a run are called -> their key in weights.json."""


@dataclass(frozen=True)
class WeightedRun:
    """What a run directory holds.

    weights: source -> weight, for all sources of the recipe, in its order. They sum to 1.
    origin: where the weights were read from.
    hashes: source -> the hash of its data when the run read it (`tokens.content_hash`); empty if there is no weights.json.
    """

    directory: Path
    problem: LLMReweighting
    weights: Mapping[str, float]
    origin: str
    hashes: Mapping[str, str]

    @property
    def recipe_file(self) -> Path:
        """The resolved recipe."""
        return RunDirectory(self.directory).recipe_file

    def with_all_rows(self) -> WeightedRun:
        """The same run, with all rows of the sources of which it read a sample (`max_rows`)."""
        sources = [replace(source, max_rows=None) for source in self.problem.sources]
        return replace(self, problem=replace(self.problem, sources=sources))

    def check_data(self) -> None:
        """Raise `InputError` if the files of a source are no longer those that the weights were learned on."""
        from bilevel_llm.data.tokens import content_hash

        changed = [
            source.name
            for source in self.problem.sources
            if source.name in self.hashes and content_hash(source) != self.hashes[source.name]
        ]
        if changed:
            raise InputError(
                f"the data of {' and '.join(map(repr, changed))} changed since the weights in {self.directory} were learned "
                "(their hash differs from that in weights.json); restore them, run again, or use --allow-changed-data"
            )


def read_run(directory: Path, plugins: Plugins, weights: str = "average") -> WeightedRun:
    """Read a run directory of `llm-reweighting`.

    weights: "average" (what the run comes to; see `bilevel.record.average`), "final" (after the last step), or a JSON file:
        an object {source: weight}, or the weights.json of another run, of which the average is taken.

    Raises `InputError` if this is no run of that problem, if it has no weights yet, and for weights that do not fit.
    """
    problem = _read_problem(directory, plugins)
    names = [source.name for source in problem.sources]
    file = directory / "weights.json"
    if weights not in KINDS:
        if not Path(weights).is_file():
            raise InputError(f"--weights {weights}: there is no such file; give average, final, or the path of a JSON file")
        given = read_json(Path(weights))
        learned = read_json(file) if file.exists() else {}
        origin, values = weights, given.get("average", given) if isinstance(given.get("sources"), dict) else given
    elif file.exists():
        learned = read_json(file)
        origin, values = f"{file} ({weights})", learned.get(KINDS[weights])
    else:
        raise InputError(f"{directory} has no weights yet: there is no {file.name}; the run has not done a step")
    hashes = documents.validated(file, learned, _Learned).data.sources
    return WeightedRun(
        directory,
        problem,
        fit_weights(values, names, origin),
        origin,
        {name: source.hash for name, source in hashes.items()},
    )


def weights_of(given: str, place: Place) -> str:
    """The option `--weights` of a command that works in the place of a run: a file is meant as it was typed."""
    return given if given in KINDS else str(place.path(Path(given)))


def fit_weights(values: Any, names: Sequence[str], origin: str) -> dict[str, float]:
    """Weights of exactly these sources, in their order, scaled to sum to 1.

    origin: where they come from, for messages. Raises `InputError` if a source is missing, unknown or has a weight that
    is no number, negative or not finite, or if all are 0.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{origin}: this does not hold weights; an object {{source: weight}} is needed")
    for name in values:
        if name not in names:
            raise InputError(f"{origin}: {name!r} is not a source of the recipe{did_you_mean(str(name), names)}")
    for name in names:
        if name not in values:
            raise InputError(f"{origin}: the source {name!r} has no weight; give one for every source (0 leaves it out)")
        weight = values[name]
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= LARGEST:
            raise InputError(
                f"{origin}: the weight of {name!r} is {weight!r}; it must be a number, and not negative "
                f"(nor above {LARGEST:g})"
            )
    total = math.fsum(values[name] for name in names)
    if total <= 0:
        raise InputError(f"{origin}: all weights are 0")
    return {name: values[name] / total for name in names}


def flags(learned: Mapping[str, Any], file: Path) -> list[Finding]:
    """The findings in a weights.json that speak against its weights. Raises `InputError` if it does not hold findings."""
    return [finding for finding in documents.validated(file, learned, _Learned).findings if finding.flagged]


@dataclass(frozen=True)
class _SourceFacts:
    hash: str


@dataclass(frozen=True)
class _Data:
    sources: dict[str, _SourceFacts] = field(default_factory=dict)


@dataclass(frozen=True)
class _Learned:
    """What is read of a weights.json beside its weights."""

    data: _Data = field(default_factory=_Data)
    findings: list[Finding] = field(default_factory=list)


def _read_problem(directory: Path, plugins: Plugins) -> LLMReweighting:
    """The problem of a resolved recipe. The other sections are not needed, and what they name may not be installed."""
    from bilevel_llm.reweighting.problem import LLMReweighting

    resolved_recipe(directory)  # says what is missing
    file = RunDirectory(directory).recipe_file
    recipe = Recipe.read(file)
    recipe.check_values()
    if not isinstance(recipe.tree.get("problem"), dict):
        raise InputError(f"{file}: not a recipe that `bilevel run` wrote: it has no section `problem`")
    section = dict(recipe.tree["problem"])
    target = section.pop("class", "")  # of a problem that a Python recipe gave as an object
    name = section.pop("name", "") or next((n for n, p in plugins.parts["problems"].items() if p.target == target), target)
    if not isinstance(name, str):
        raise InputError(f"{recipe.where(('problem', 'name'))}: problem.name is {name!r}; it must be text")
    kind = plugins.find("problems", name).load()
    if not (isinstance(kind, type) and issubclass(kind, LLMReweighting)):
        raise InputError(f"{file}: a run of the problem {name!r}, which has no sources to mix; llm-reweighting has")
    try:
        problem: LLMReweighting = build_section(kind, section, recipe, ("problem",))
    except InputError as error:
        raise InputError(f"{error}; a run of another version has to be made again") from error
    return problem


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `InputError` if the file does not hold one."""
    return documents.read_json(file, dict[str, Any])
