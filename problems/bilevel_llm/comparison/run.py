"""Compare methods: read and check everything, run the cells that are not done yet, and show the result."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from bilevel import Backend, InputError, Problem
from bilevel.agreement import first_then_others, on_first, require_same
from bilevel.config import OBJECTS, build_parts, build_section, read_recipe
from bilevel.documents import read_json
from bilevel.files import remove_leftovers, write_atomic
from bilevel.lock import owned
from bilevel.loop import Interrupted
from bilevel.plain import flatten, to_plain
from bilevel.plugins import Plugins
from bilevel.recipe import Recipe
from bilevel.run_directory import RunDirectory
from bilevel.run_reader import resolved_recipe
from bilevel.suggest import did_you_mean
from bilevel_llm.comparison import harness, result
from bilevel_llm.comparison.cell import Bench, Cell, check_tuning
from bilevel_llm.comparison.held_out import HeldOut, pick_device, read_held_out
from bilevel_llm.comparison.methods import Method, Parts, check_entries, make_methods
from bilevel_llm.comparison.seed_rows import SeedRows
from bilevel_llm.comparison.settings import BASE, LEARNED, CompareSettings
from bilevel_llm.model.files import find_model
from bilevel_llm.model.lora import require_peft
from bilevel_llm.reweighting.granularity import PerSource
from bilevel_llm.reweighting.problem import LLMReweighting

log = logging.getLogger("bilevel.llm")

SECTION = "compare"
DATA = "data"
"""The section of a comparison's own recipe that says which data and models it is about."""

FREE = (
    *(f"run.{key}" for key in ("output", "seed", "checkpoint_every", "keep_checkpoints", "checkpoint_in_background")),
    *(f"{SECTION}.{key}" for key in ("methods", "seeds", "reference")),
    "solver",
)
"""Keys that may differ when a comparison is resumed: methods and seeds may be added or removed. What a method does must not
change; its description is kept beside its cells."""


@dataclass(frozen=True)
class Comparing:
    """A comparison that has been read and checked."""

    bench: Bench
    methods: Sequence[Method]
    references: Sequence[str]
    recipe: Mapping[str, Any]
    directory: Path

    def cells(self) -> dict[tuple[str, int], Cell]:
        """(method, seed) -> cell, ordered by seed, so that a stopped comparison has complete pairs."""
        base = Cell(self.bench, self.directory / "cells" / BASE)
        seeds = self.bench.settings.seeds
        return {(BASE, seed): base for seed in seeds} | {
            (method.label, seed): Cell(self.bench, self.directory / "cells" / method.label / f"seed-{seed}", method, seed)
            for seed in seeds
            for method in self.methods
        }


def load(
    file: Path,
    plugins: Plugins,
    *,
    changes: Sequence[str],
    output: str | None,
    keep_models: bool = False,
    leaving: ExitStack,
) -> Comparing:
    """Read a recipe, its data and its test sets, and check what can be known before a model is loaded.

    Every process of a launcher calls this alike.

    leaving: gets what is to be undone when the comparison is over: the lock on its directory, the meeting of processes.

    Raises `InputError` for what the user has to correct.
    """
    recipe = read_recipe(file, changes=changes, output=output)
    section = recipe.tree.get(SECTION)
    if not isinstance(section, dict):
        raise InputError(
            f"{recipe.where([SECTION])}: the section {SECTION} is missing or is not a mapping; it says what to compare"
        )
    settings: CompareSettings = build_section(CompareSettings, section, recipe, (SECTION,))
    check_entries(settings.methods, recipe, plugins)
    learns = LEARNED in [entry if isinstance(entry, str) else entry.get("name") for entry in settings.methods]
    objects = OBJECTS if learns and "solver" in recipe.tree else {"problem": Problem, "backend": Backend}
    built, resolved = build_parts(recipe, objects, plugins, ignored=["solver", DATA])
    problem, directory = built["problem"], Path(built["run"].output)
    if not isinstance(problem, LLMReweighting):
        raise InputError(f"{recipe.where(['problem', 'name'])}: only data of an llm-reweighting problem can be compared")
    resolved[SECTION] = to_plain(settings)
    backend: Backend = built["backend"]
    backend.start(0)
    leaving.callback(backend.close)

    def claim() -> None:
        _check_directory(directory, resolved)
        leaving.enter_context(owned(directory))
        _check_directory(directory, resolved)

    on_first(backend, claim)
    if settings.finetune.method == "lora":
        require_peft()
    files = find_model(settings.model or problem.model)
    data = SeedRows(problem, settings.fresh_rows)

    def read() -> tuple[LLMReweighting, list[Method], list[HeldOut]]:
        first = data(settings.seeds[0])
        parts = Parts(recipe, plugins, data, settings.seeds, built["run"], built["active"])
        sets = [
            read_held_out(
                test,
                first,
                data.elsewhere,
                files,
                max_length=settings.finetune.max_length or problem.max_length,
                max_new_tokens=settings.max_new_tokens,
                on_overlap=settings.on_overlap,
            )
            for test in settings.test
        ]
        return first, make_methods(settings.methods, parts), sets

    first, methods, sets = first_then_others(backend, read)
    references = _references(settings, [method.label for method in methods], recipe)
    device = pick_device(getattr(backend, "device", None))
    bench = Bench(settings, first, data, resolved["backend"], backend, sets, device, plugins, keep_models)
    resolved[DATA] = {
        "sources and model of the weights": data.fingerprint(),
        "tuned model": files.fingerprint,
        **{f"test set {held_out.name}": held_out.table.content_hash for held_out in sets},
    }
    require_same(backend, "data", resolved[DATA])
    for method in methods:
        method.prepare()
        _check_method(directory, method)
    _check_budget(bench, methods, recipe)
    check_tuning(bench)
    if not isinstance(problem.granularity, PerSource):
        log.warning("mixes are drawn by the weights of sources; weights of single rows are not used")
    comparing = Comparing(bench, methods, references, resolved, directory)

    def check() -> None:
        _check_directory(directory, resolved)
        for cell in comparing.cells().values():
            cell.check()

    on_first(backend, check)
    return comparing


def announce(comparing: Comparing, console: Console) -> None:
    """Say what `run` would do."""
    settings, cells = comparing.bench.settings, comparing.cells()
    size = f"{settings.rows:,} rows" if settings.rows is not None else f"{settings.tokens:,} tokens"
    for s in comparing.bench.sets:
        console.print(f"test set {s.name}: {len(s.table):,} rows, {', '.join(s.metrics)}", markup=False)
    console.print(f"every mix: {size}; fine-tuning: {settings.finetune.method}", markup=False)
    for name in (BASE, *(method.label for method in comparing.methods)):
        own = {id(cell): cell for (method, _), cell in cells.items() if method == name}
        done = sum(cell.done for cell in own.values())
        left = f"{len(own) - done} cell{'s' * (len(own) - done != 1)} to do"
        console.print(f"{name}: {left}{f', {done} done' if done else ''}", markup=False)


def run(comparing: Comparing, console: Console) -> None:
    """Run the cells that are not done, write the comparison after each, and show it at the end.

    Raises `Interrupted` when asked to stop; the same call then resumes the comparison.
    """
    backend, cells = comparing.bench.meeting, comparing.cells()
    on_first(backend, lambda: _begin(comparing))
    done: set[tuple[str, int]] = on_first(backend, lambda: {key for key, cell in cells.items() if cell.done})
    try:
        for (name, seed), cell in cells.items():
            if (name, seed) not in done:
                left = len({id(other) for key, other in cells.items() if key not in done})
                console.print(Text(f"{cell.name} ({left} cells to do)", style="bold"))
                cell.run()
                done |= {key for key, other in cells.items() if other is cell}
                finished = {key: cells[key] for key in cells if key in done}
                on_first(backend, partial(_write, comparing, finished))
    except (Interrupted, KeyboardInterrupt) as error:
        raise Interrupted(
            f"stopped in {comparing.directory}; finished cells and checkpoints are kept; the same command resumes it"
        ) from error
    content = on_first(backend, lambda: _finish(comparing))
    console.print(result.shown(content))
    console.print(f"written to {comparing.directory}; `bilevel report {comparing.directory}` draws it", soft_wrap=True)


def _references(settings: CompareSettings, labels: Sequence[str], recipe: Recipe) -> Sequence[str]:
    """What the methods are compared with. Raises `InputError` for a name that is not among them."""
    given = settings.reference
    if given is None:
        return ["uniform" if "uniform" in labels else labels[0]]
    references = [given] if isinstance(given, str) else given
    for reference in references:
        if reference not in labels:
            where = recipe.where([SECTION, "reference"])
            guess = did_you_mean(reference, labels)
            raise InputError(f"{where}: compare.reference is {reference!r}, which is not among the methods{guess}")
    return references


def _begin(comparing: Comparing) -> None:
    """Make the directory what a call that stopped has left of it."""
    RunDirectory(comparing.directory).create(comparing.recipe)
    for directory in (comparing.directory / "cells").rglob("*"):
        remove_leftovers(directory)  # of a call that was killed: they may be as large as a model
    for method in comparing.methods:
        file = _method_file(comparing.directory, method)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(method.described, indent=1, ensure_ascii=False))


def _finish(comparing: Comparing) -> dict[str, Any]:
    """Write the whole result."""
    cells = comparing.cells()
    _hand_over(comparing, cells)
    return _write(comparing, cells)


def _write(comparing: Comparing, finished: Mapping[tuple[str, int], Cell]) -> dict[str, Any]:
    names = [BASE, *(method.label for method in comparing.methods)]
    content = result.build(comparing.bench, names, finished, comparing.references)
    result.write(content, comparing.directory)
    return content


def _hand_over(comparing: Comparing, cells: Mapping[tuple[str, int], Cell]) -> None:
    """Write lm-eval.sh for the models that were kept."""
    bench = comparing.bench
    models = {
        f"{name}-seed-{seed}": cell.directory / "model"
        for (name, seed), cell in cells.items()
        if (cell.directory / "model").is_dir()
    }
    if models:
        text = harness.script(
            {BASE: find_model(bench.model).path, **models},
            Path("lm-eval"),
            trust_remote_code=bench.problem.trust_remote_code,
            device=bench.device,
        )
        write_atomic(comparing.directory / "lm-eval.sh", text)


def _check_budget(bench: Bench, methods: Sequence[Method], recipe: Recipe) -> None:
    """Raises `InputError` if it is known before the weights are that a mix cannot be as large as asked for."""
    settings = bench.settings
    capacity = {name: rows * settings.max_repeats for name, rows in _usable(bench.problem).items()}
    for method in methods:
        where = recipe.where([SECTION, "methods"])
        try:
            if method.known is not None:
                for seed in settings.seeds:
                    bench.mix(method.known(seed), seed)
        except InputError as error:
            raise InputError(f"{where}: {method.label}: {error} (in a recipe: keys of compare)") from error
        if method.most_rows is not None and settings.tokens is not None:
            lengths = np.sort(np.concatenate([table.lengths for table in bench.problem.source_tables.values()]))
            most = settings.max_repeats * int(lengths[-method.most_rows :].sum())
            if most < settings.tokens:
                raise InputError(
                    f"{recipe.where([SECTION, 'tokens'])}: compare.tokens is {settings.tokens:,}, and the "
                    f"{method.most_rows:,} rows that {method.label} selects have {most:,} at most (each row "
                    f"{settings.max_repeats} times); ask for fewer, raise compare.max_repeats, or let it select more"
                )
        if method.known is None and settings.rows is not None:
            drawn = sum(capacity.values()) if method.most_rows is None else method.most_rows * settings.max_repeats
            if drawn < settings.rows:
                raise InputError(
                    f"{recipe.where([SECTION, 'rows'])}: compare.rows is {settings.rows:,}, and {method.label} can draw "
                    f"{drawn:,} at most (each row {settings.max_repeats} times); ask for fewer, or raise compare.max_repeats"
                )
            short = [name for name, rows in capacity.items() if rows < settings.rows]
            if short and settings.on_shortfall == "error" and method.most_rows is None:
                log.warning(
                    "%s: if all weight goes to %s, its rows are too few for the mix, and the comparison stops there "
                    "(compare.on_shortfall=redistribute takes rows of the other sources)",
                    method.label,
                    " or ".join(map(repr, short)),
                )


def _usable(problem: LLMReweighting) -> dict[str, int]:
    """Source -> the number of its rows that may be drawn."""
    from bilevel_llm.mixing.pool import make_pools

    return {pool.name: len(pool.rows) for pool in make_pools(problem.source_tables, problem.validation_tables, 0)}


def _check_directory(directory: Path, recipe: Mapping[str, Any]) -> None:
    """Raises `InputError` if the directory holds something else, naming the key that differs."""
    run = RunDirectory(directory)
    if not run.recipe_file.exists():
        run.check_free()
        return
    before = resolved_recipe(directory)
    if SECTION not in before:
        raise InputError(f"{directory} holds a run, not a comparison; choose another --output")
    sections = before.keys() & recipe.keys()
    _require_same(directory, *({name: tree[name] for name in sections} for tree in (before, recipe)))


def _check_method(directory: Path, method: Method) -> None:
    """Raises `InputError` if the method's cells were made with other settings."""
    file = _method_file(directory, method)
    if file.exists():
        names = (f"the method {method.label}", read_json(file, dict[str, Any]), method.described)
        _require_same(directory, *({names[0]: tree} for tree in names[1:]))


def _method_file(directory: Path, method: Method) -> Path:
    return directory / "cells" / method.label / "method.json"


def _require_same(directory: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    was, is_now = (flatten(json.loads(json.dumps(tree))) for tree in (before, now))
    for key in sorted(was.keys() | is_now.keys()):
        free = any(key == name or key.startswith(f"{name}.") for name in FREE)
        if was.get(key) != is_now.get(key) and not free:
            raise InputError(
                f"{directory} holds a comparison of a different recipe: {key} was {was.get(key)!r} and is now "
                f"{is_now.get(key)!r}; use the same recipe, or choose another --output"
            )
