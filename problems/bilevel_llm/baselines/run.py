"""Let a baseline find weights or select rows, and write what a reweighting run would write."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilevel.launch import rank

if TYPE_CHECKING:
    from rich.console import RenderableType

    from bilevel import Solver
    from bilevel.recipe import Recipe
    from bilevel.run_directory import RunDirectory
    from bilevel_llm.baselines.base import Baseline, Outcome, Task


def load(
    method: str, file: Path, plugins: Any, *, changes: list[str], output: str | None, resume: bool = False
) -> "tuple[Baseline, Task]":
    """Read a recipe. Raises `InputError` for what the user has to correct; no data is read yet."""
    from bilevel import Backend, InputError, Problem
    from bilevel.config import build_parts, read_recipe
    from bilevel.plain import to_plain
    from bilevel_llm.baselines.base import Baseline, Task
    from bilevel_llm.reweighting.problem import LLMReweighting

    recipe = read_recipe(file, changes=changes, output=output)
    section = recipe.tree.setdefault("baseline", {})
    if isinstance(section, dict) and section.setdefault("name", method) != method:
        raise InputError(
            f"{recipe.where(['baseline', 'name'])}: the recipe is for the baseline {section['name']!r}, and "
            f"{method!r} was asked for; name that one, or remove the section"
        )
    objects = {"problem": Problem, "baseline": Baseline, "backend": Backend}
    parts, resolved = build_parts(recipe, objects, plugins, ignored=["solver"])
    if not isinstance(parts["problem"], LLMReweighting):
        raise InputError(
            f"{recipe.where(['problem', 'name'])}: only data of an llm-reweighting problem can be given weights"
        )
    baseline = parts["baseline"].completed(lambda: solver_of(recipe, plugins))
    resolved["baseline"] |= to_plain(baseline)  # so that what is kept does not need the solver
    if resume and not baseline.resumable:
        raise InputError(f"{method} keeps nothing to resume from; run it again without --resume, with another --output")
    task = Task(
        problem=parts["problem"],
        backend=parts["backend"],
        active=parts["active"],
        run=parts["run"],
        resume=resume,
        recipe=resolved,
        observer=plugins.hooks,
    )
    return baseline, task


def solver_of(recipe: "Recipe", plugins: Any) -> "Solver[Any] | None":
    """The solver of a recipe, from which baselines take a step size; None if the recipe has none.

    Raises `InputError` for what is wrong with that section.
    """
    from bilevel import Solver
    from bilevel.config import build_parts

    if not recipe.tree.get("solver"):
        return None
    others = [section for section in recipe.tree if section != "solver"]
    built, _ = build_parts(recipe, {"solver": Solver}, plugins, ignored=others)
    solver: Solver[Any] = built["solver"]
    return solver


def run(method: str, baseline: "Baseline", task: "Task") -> "Outcome":
    """Prepare the problem, find weights and check them, and write them if the task has a directory.

    Raises `InputError` before a model is loaded, and `RunError` if the weights are not a distribution over the sources.
    """
    from bilevel.run_directory import RunDirectory

    directory = RunDirectory(Path(task.run.output)) if task.run.output is not None else None
    if directory is None or rank() != 0:
        return _find(method, baseline, task, directory)
    _check_free(directory, baseline, task)
    with directory.owned():
        _check_free(directory, baseline, task)
        return _find(method, baseline, task, directory)


def _check_free(directory: "RunDirectory", baseline: "Baseline", task: "Task") -> None:
    """Raise `InputError` if the directory holds anything but what this call goes on with, or does again."""
    from bilevel.account import FILE

    killed = not baseline.resumable and directory.holds_only(
        {FILE, "selection.jsonl"}, task.recipe or {}
    )  # no weights.json yet
    if not task.resume and not killed:
        directory.check_free()


def _find(method: str, baseline: "Baseline", task: "Task", directory: "RunDirectory | None") -> "Outcome":
    import math

    from bilevel import RunError

    task.problem.prepare()
    baseline.check(task)
    outcome = baseline.find(task)
    weights = outcome.weights
    if set(weights) != set(task.problem.source_tables):
        raise RunError(
            f"{method} gave weights for {sorted(weights)}, but the sources are {sorted(task.problem.source_tables)}"
        )
    if not all(weight >= 0 for weight in weights.values()) or not math.isclose(sum(weights.values()), 1, abs_tol=1e-6):
        raise RunError(f"{method} gave weights that are not a distribution: {dict(weights)}")
    if directory is not None and rank() == 0:
        directory.create(task.recipe or {})
        directory.write({**_account(directory.path, outcome), **files(method, baseline, outcome, task)})
    return outcome


def _account(directory: Path, outcome: "Outcome") -> dict[str, str]:
    """account.json of the training that found the weights, if there was one, with the findings and tables of the method."""
    import dataclasses

    from bilevel.account import FILE, Account

    if not (directory / FILE).exists():
        return {}
    found = Account.read(directory / FILE)
    whole = dataclasses.replace(
        found, findings=[*outcome.all_findings, *found.findings], tables=[*outcome.tables, *found.tables]
    )
    return {FILE: whole.to_json()}


def files(method: str, baseline: "Baseline", outcome: "Outcome", task: "Task") -> dict[str, str]:
    """weights.json as a reweighting run writes it, plus `method` and `cost`; and selection.jsonl if rows were selected."""
    import dataclasses
    import json
    from importlib.metadata import version

    import torch

    from bilevel.distribution import logits_of
    from bilevel.plain import to_plain

    tables = task.problem.source_tables
    weights = {name: outcome.weights[name] for name in tables}
    logits = logits_of(torch.tensor(list(weights.values()), dtype=torch.float64), 0.0)
    content: dict[str, Any] = {
        "sources": weights,
        "average": weights,
        "logits": dict(zip(weights, logits.tolist(), strict=True)),
        "method": {"name": method, **to_plain(baseline)},
        "cost": dataclasses.asdict(outcome.cost),
        "steps": task.run.limit,
        "findings": [dataclasses.asdict(finding) for finding in outcome.all_findings],
        "trajectory": {name: [round(value, 6) for value in values] for name, values in outcome.trajectory.items()},
        "trajectory_steps": list(range(max(map(len, outcome.trajectory.values()), default=0))),
        "seed": task.run.seed,
        "versions": {name: version(name) for name in ("bilevel", "torch")},
        **task.problem.identity(),
    }
    written = {}
    if outcome.selection is not None:
        rows = [
            {
                "source": name,
                "file": str(tables[name].files[tables[name].file[row]]),
                "number": int(tables[name].number[row]),
                "row": row,
                "score": score,
            }
            for name, row, score in outcome.selection
        ]
        content["selection"] = {"file": "selection.jsonl", "rows": len(rows)}
        written["selection.jsonl"] = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    # last, so that whoever finds weights.json finds the other file too
    return {**written, "weights.json": json.dumps(content, indent=1, ensure_ascii=False)}


def table(method: str, outcome: "Outcome", task: "Task") -> "RenderableType":
    """The weights, largest first, and below them what they cost and what to know about them."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, header_style="bold", pad_edge=False)
    shown.add_column("source")
    columns = ("rows", "weight") + (("selected",) if outcome.selection is not None else ())
    for column in columns:
        shown.add_column(column, justify="right")
    for name in sorted(outcome.weights, key=lambda name: -outcome.weights[name]):
        row = [name, f"{len(task.problem.source_tables[name]):,}", f"{outcome.weights[name]:.3f}"]
        if outcome.selection is not None:
            row.append(f"{len(outcome.selection.rows[name]):,}")
        shown.add_row(*row)
    cost = outcome.cost
    words = f"{method}: {cost.seconds:.1f} s, {cost.tokens:,} tokens forward, {cost.backward_tokens:,} of them backward too"
    return Group(shown, Text(words), *(Text(f"- {f.sentence}") for f in outcome.all_findings))
