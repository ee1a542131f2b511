"""The entries of `compare.methods`, each as a way to find weights for a seed."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bilevel import Active, Backend, Finding, InputError, documents
from bilevel.config import OBJECTS, Config, build_parts, build_section
from bilevel.launch import rank
from bilevel.plain import to_plain
from bilevel.plugins import Plugins
from bilevel.recipe import Recipe
from bilevel.record import total_seconds, total_size
from bilevel.run_directory import RunDirectory
from bilevel.run_reader import SavedRun
from bilevel.run_reader import read_run as saved_run
from bilevel.run_settings import RunSettings
from bilevel_llm.baselines import run as baselines
from bilevel_llm.baselines.base import Baseline, Task
from bilevel_llm.comparison.settings import BASE, LEARNED, SINGLE, label_of
from bilevel_llm.data.tokens import TokenTable
from bilevel_llm.reweighting.problem import LLMReweighting
from bilevel_llm.reweighting.saved_run import fit_weights, flags, read_json, read_run


@dataclass(frozen=True)
class Found:
    """Weights, and what it took to find them.

    weights: source -> weight; if rows were selected, the source's share of them.
    origin: where the weights come from.
    seconds, tokens: what finding them took; most of the tokens went through a forward and a backward pass.
    selection: source -> the rows of its table that may be trained on. None: all of them.
    findings: what a reader should know before trusting the weights.
    """

    weights: Mapping[str, float]
    origin: str
    seconds: float = 0.0
    tokens: int = 0
    selection: Mapping[str, list[int]] | None = None
    findings: Sequence[Finding] = ()

    @property
    def rows(self) -> Mapping[str, NDArray[np.int64]] | None:
        """The selection as `make_mix` takes it."""
        return None if self.selection is None else {n: np.array(rows, np.int64) for n, rows in self.selection.items()}


@dataclass(frozen=True)
class _Learned:
    """What is read from the weights.json of a run that was just done."""

    average: dict[str, float]


@dataclass(frozen=True)
class _Cost:
    seconds: float
    tokens: int


@dataclass(frozen=True)
class _Selection:
    file: str


@dataclass(frozen=True)
class _Kept:
    """What is read from the weights.json of any run, beside its weights and findings."""

    selection: _Selection | None = None
    cost: _Cost | None = None


@dataclass(frozen=True)
class _SelectedRow:
    """A line of selection.jsonl."""

    source: str
    file: str
    number: int


@dataclass(frozen=True)
class Method:
    """A way to find weights.

    described: everything that decides what it finds, as plain data.
    known: seed -> what it finds, if that needs no model; None otherwise.
    find: (seed, a directory of its own) -> what it finds. An interrupted call is resumed from what it left in the directory.
    prepare: raises `InputError` for what the user has to correct.
    most_rows: the largest number of rows that it leaves to be drawn from. None: all.
    """

    label: str
    described: Mapping[str, Any]
    find: Callable[[int, Path], Found]
    known: Callable[[int], Found] | None = None
    prepare: Callable[[], None] = lambda: None
    most_rows: int | None = None


@dataclass(frozen=True)
class Parts:
    """What methods are made from.

    data: seed -> the problem with the rows of that seed, already prepared.
    """

    recipe: Recipe
    plugins: Plugins
    data: Callable[[int], LLMReweighting]
    seeds: Sequence[int]
    run: RunSettings
    active: Active

    @property
    def problem(self) -> LLMReweighting:
        """The problem with the rows of the first seed."""
        return self.data(self.seeds[0])


Entry = str | dict[str, Any]
"""An entry of `compare.methods`."""

_OWN = ("solver", "active", "steps")
"""What an entry that learns may have of its own."""


def spelled_out(entries: Sequence[Entry], sources: Sequence[str]) -> list[Entry]:
    """The entries, with one for each source in place of "single-sources"."""
    each: list[Entry] = [
        {"name": f"only {source.replace('/', '-')}", "weights": {name: float(name == source) for name in sources}}
        for source in sources
    ]
    return [one for entry in entries for one in (each if entry == SINGLE else [entry])]


def check_entries(entries: Sequence[Entry], recipe: Recipe, plugins: Plugins) -> None:
    """Raises `InputError` for entries that name no method, and for labels given twice. No data is read.

    entries: as they are in the recipe.
    """
    labels = [label_of(entry) for entry in entries]
    for i, (entry, label) in enumerate(zip(entries, labels, strict=True)):
        where = recipe.where(["compare", "methods", i])
        if entry == SINGLE:
            continue
        if isinstance(entry, dict) and "name" not in entry:
            raise InputError(f"{where}: compare.methods.{i} has no name")
        if label in labels[:i]:
            raise InputError(f"{where}: two methods are called {label!r}; give one of them a label of its own")
        if label == BASE or not label or any(sign in label for sign in "/\\\0") or label in (".", ".."):
            raise InputError(f"{where}: a method cannot be called {label!r}; give it another label")
        if _kind(entry) == "baseline":
            name = entry if isinstance(entry, str) else entry["name"]
            try:
                plugins.find("baselines", name)
            except InputError as error:
                words = f"{error}; or {LEARNED}, {SINGLE}, or a name of your own with `weights` or `run`"
                raise InputError(f"{where}: {words}") from error
        elif isinstance(entry, dict):
            known = ["name", "label", *(_OWN if _kind(entry) == LEARNED else [_kind(entry)])]
            if extra := sorted(set(entry) - set(known)):
                raise InputError(f"{where}: unknown key compare.methods.{i}.{extra[0]}; known here: {', '.join(known)}")


def make_methods(entries: Sequence[Entry], parts: Parts) -> list[Method]:
    """Make a method of every entry, of which "single-sources" makes several.

    Raises `InputError` for what the user has to correct.
    """
    methods: list[Method] = []
    names = list(parts.problem.source_tables)
    for i, entry in enumerate(entries):
        for one in spelled_out([entry], names):
            methods.append(_make(i, one, parts))
            if methods[-1].label in [method.label for method in methods[:-1]]:
                where = parts.recipe.where(["compare", "methods", i])
                raise InputError(f"{where}: two methods are called {methods[-1].label!r}; give one of them another label")
    return methods


def _kind(entry: str | Mapping[str, Any]) -> str:
    if isinstance(entry, dict):
        for kind in ("weights", "run"):
            if kind in entry:
                return kind
    return LEARNED if (entry if isinstance(entry, str) else entry.get("name")) == LEARNED else "baseline"


def _make(position: int, entry: Entry, parts: Parts) -> Method:
    path = ("compare", "methods", position)
    where, label = parts.recipe.where(path), label_of(entry)
    if _kind(entry) == LEARNED:
        return _learned(label, {} if isinstance(entry, str) else entry, path, parts)
    if isinstance(entry, dict) and "run" in entry:
        return _given_run(label, str(entry["run"]), parts, where)
    if isinstance(entry, dict) and "weights" in entry:
        weights = fit_weights(entry["weights"], list(parts.problem.source_tables), where)
        given = Found(weights, "given by hand")
        return Method(label, {"weights": weights}, lambda seed, _: given, lambda seed: given)
    settings = {} if isinstance(entry, str) else {k: v for k, v in entry.items() if k not in ("name", "label")}
    return _baseline(label, entry if isinstance(entry, str) else entry["name"], settings, path, parts)


def _given_run(label: str, run: str, parts: Parts, where: str) -> Method:
    """The weights of a run, or of one for each seed."""
    of_seed = {seed: _of_run(Path(run.replace("{seed}", str(seed))), seed, parts, where) for seed in parts.seeds}
    described: dict[str, Any] = {"run": run}
    if "{seed}" not in run:
        described["weights"] = dict(of_seed[parts.seeds[0]].weights)
    return Method(label, described, lambda seed, _: of_seed[seed], of_seed.__getitem__)


def _learned(label: str, entry: Mapping[str, Any], path: tuple[str | int, ...], parts: Parts) -> Method:
    """The recipe's run, with what the entry has of its own."""
    recipe = copy.deepcopy(parts.recipe)
    for key in (key for key in _OWN if key in entry):
        recipe.put("run.steps" if key == "steps" else key, entry[key], parts.recipe.where((*path, key)))
    built, resolved = build_parts(recipe, OBJECTS, parts.plugins)
    run: RunSettings = built["run"]

    def find(seed: int, directory: Path) -> Found:
        of_seed = dataclasses.replace(run, seed=seed, output=str(directory))
        again, _ = build_parts(recipe, OBJECTS, parts.plugins)  # a backend serves only one run
        problem = parts.data(seed)
        plain = {"problem": {**resolved["problem"], **to_plain(problem)}, "run": to_plain(of_seed)}
        config = Config(**{**again, "problem": problem, "run": of_seed}, recipe={**resolved, **plain})
        result = config.fit(resume=_begun(directory), observer=parts.plugins.hooks)
        file = directory / "weights.json"
        learned = read_json(file)
        return Found(
            documents.validated(file, learned, _Learned).average,
            "the bilevel run of this recipe",
            total_seconds(result.history),
            total_size(result.history),
            findings=flags(learned, file),
        )

    described = {"solver": resolved["solver"], "steps": run.limit, "active": resolved["active"]}
    return Method(label, described, find)


def _baseline(label: str, name: str, settings: dict[str, Any], path: tuple[str | int, ...], parts: Parts) -> Method:
    kind = parts.plugins.find("baselines", name).load()
    built: Baseline = build_section(kind, settings, parts.recipe, path)
    baseline = built.completed(lambda: baselines.solver_of(parts.recipe, parts.plugins))
    objects: dict[str, type] = {"backend": Backend}

    def task(seed: int, directory: Path | None) -> Task:
        ignored = ["solver", "problem"]
        built, resolved = build_parts(parts.recipe, objects, parts.plugins, ignored=ignored)
        run = dataclasses.replace(parts.run, seed=seed, output=None if directory is None else str(directory))
        problem = parts.data(seed)
        return Task(
            problem=problem,
            backend=built["backend"],
            active=parts.active,
            run=run,
            resume=baseline.resumable and directory is not None and _begun(directory),
            recipe={
                "problem": {"name": "llm-reweighting", **to_plain(problem)},
                "baseline": {"name": name, **to_plain(baseline)},
                **resolved,
                "run": to_plain(run),
            },
            observer=parts.plugins.hooks,
        )

    def find(seed: int, directory: Path | None) -> Found:
        if directory is not None and not baseline.resumable and rank() == 0:  # a slower process would remove what it writes
            shutil.rmtree(directory, ignore_errors=True)  # an interrupted call that cannot be resumed
        outcome = baselines.run(name, baseline, task(seed, directory))
        selection = outcome.selection
        return Found(
            dict(outcome.weights),
            name,
            outcome.cost.seconds,
            outcome.cost.tokens,
            None if selection is None else {source: rows.tolist() for source, rows in selection.rows.items()},
            outcome.all_findings,
        )

    rows = sum(map(len, parts.problem.source_tables.values()))
    return Method(
        label,
        {"baseline": name, **to_plain(baseline), "steps": parts.run.limit},
        find,
        None if baseline.trains else lambda seed: find(seed, None),
        lambda: baseline.check(task(parts.seeds[0], None)),
        baseline.most_rows(rows),
    )


def _of_run(directory: Path, seed: int, parts: Parts, where: str) -> Found:
    """The weights and the selection of a finished run, which must be about this recipe's data, with the rows of the seed."""
    tables = parts.data(seed).source_tables
    try:
        run = read_run(directory, parts.plugins)
        weights = fit_weights(run.weights, list(tables), f"{directory}")
        content = read_json(directory / "weights.json")
        kept = documents.validated(directory / "weights.json", content, _Kept)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    for name, table in tables.items():
        if run.hashes.get(name, table.content_hash) != table.content_hash:
            raise InputError(f"{where}: {directory} learned its weights on other data: the files of {name!r} differ")
    selection = None if kept.selection is None else _selected(directory / kept.selection.file, tables)
    cost = kept.cost or _cost(saved_run(directory))
    return Found(
        weights,
        f"{directory} (average)",
        cost.seconds,
        cost.tokens,
        selection,
        flags(content, directory / "weights.json"),
    )


def _selected(file: Path, tables: Mapping[str, TokenTable]) -> dict[str, list[int]]:
    """Source -> the rows of selection.jsonl, found by their places in the files."""
    places = {
        name: {(str(t.files[f]), n): i for i, (f, n) in enumerate(zip(t.file.tolist(), t.number.tolist(), strict=True))}
        for name, t in tables.items()
    }
    rows: dict[str, list[int]] = {name: [] for name in places}
    for entry in documents.read_json_lines(file, _SelectedRow):
        row = places.get(entry.source, {}).get((entry.file, entry.number))
        if row is None:
            raise InputError(f"{file}: {entry.file}:{entry.number} is not a usable row of {entry.source!r} here")
        rows[entry.source].append(row)
    return rows


def _cost(run: SavedRun) -> _Cost:
    return _Cost(total_seconds(run.history), total_size(run.history))


def _begun(directory: Path) -> bool:
    return RunDirectory(directory).recipe_file.exists()
