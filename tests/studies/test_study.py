"""The study: what is checked before its first cell, and the page that is made of its numbers."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from bilevel.config import build_parts, build_section
from bilevel.plugins import load_plugins
from bilevel.problem import Problem
from bilevel.recipe import Recipe
from bilevel_llm.comparison.settings import CompareSettings, label_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def scripts_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "studies"))


def cell(method: str, seed: int, loss: float, **more: Any) -> dict[str, Any]:
    spent = {"seconds": 20.0 if method == "learned" else 0.0, "tokens": 9}
    cost = {} if method == "base" else {"cost": {"weights": spent, "finetuning": {"seconds": 10.0, "tokens": 5}}}
    return {"method": method, "seed": seed, "metrics": {"row_loss/t": loss, "token_accuracy/t": 0.25}, **cost, **more}


def results(**changes: Any) -> dict[str, Any]:
    good, bad = {"a": 0.9, "b": 0.1}, {"a": 0.2, "b": 0.8}
    cells = [
        cell("base", 0, 3.0), cell("base", 1, 3.0),
        *(cell("uniform", seed, 2.0 + seed / 10, weights={"a": 0.5, "b": 0.5}) for seed in (0, 1)),
        cell("learned", 0, 1.8, weights=good, verdict="use"), cell("learned", 1, 1.9, weights=bad, verdict="longer"),
        *(cell("only a", seed, 1.85, weights={"a": 1.0, "b": 0.0}) for seed in (0, 1)),
        *(cell("only b", seed, 2.5, weights={"a": 0.0, "b": 1.0}) for seed in (0, 1)),
    ]  # fmt: skip
    return {
        "name": "made up", "about": "main", "model": "m", "tuned_model": "m", "sources": {"a": 10, "b": 20},
        "validation": {"v": 5}, "test": {"t": 7}, "tokens": 100, "max_length": 8, "seeds": [0, 1], "cells": cells,
        "methods": ["base", "uniform", "learned", "only a", "only b"], "findings": [], "machine": "none",
        "versions": {"bilevel": "0"},
        "differences": [
            {"method": "learned", "against": "uniform", "metric": "row_loss/t", "mean": -0.2, "low": -0.3, "high": -0.1},
            {"method": "only a", "against": "learned", "metric": "row_loss/t", "mean": -0.01, "low": -0.02, "high": -0.005},
        ],
        **changes,
    }  # fmt: skip


def shown(*found: dict[str, Any]) -> str:
    import page
    from results import Results

    text: str = page.text([Results.model_validate(one) for one in found])
    return text


def line(text: str, start: str) -> list[str]:
    (found,) = (one for one in text.splitlines() if one.startswith(f"| {start} |"))
    return [part.strip() for part in found.strip("|").split("|")]


def test_the_page_shows_scores_differences_costs_and_verdicts() -> None:
    text = shown(results())
    scores = line(text, "**learned**")
    assert scores[1].startswith("1.850")
    assert scores[2] == "-0.200 [-0.300, -0.100]"
    assert scores[3].startswith("25.0%")
    assert scores[4:6] == ["1.8", "2.0"]  # 9 of 5 tokens, 20 of 10 seconds
    assert scores[6] == "use: 1 of 2"
    assert line(text, "made up")[3:] == ["uniform", "–"]


def test_the_page_leaves_out_what_is_not_measured_and_names_it() -> None:
    found = results(methods=["base", "uniform", "learned", "only a", "only b", "swarm", "odm"])
    text = shown(found)
    assert "nan" not in text
    assert "| odm |" not in text
    assert "| − swarm |" not in text
    assert "Not measured yet: swarm, odm." in text


def test_comparisons_that_need_a_gpu_are_made_without_one_only_if_they_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import study
    import torch

    cases = study.read_study(ROOT / "studies" / "study.yaml")
    large = {case.name for case in cases if case.gpu}
    assert large
    for there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert {case.name for case in study.chosen(cases, []) if case.gpu} == (large if there else set())
        assert [case.name for case in study.chosen(cases, sorted(large)[:1])] == sorted(large)[:1]


def test_the_page_says_how_often_the_top_source_is_the_best_alone() -> None:
    weights = [one for one in shown(results()).splitlines() if one.startswith("| learned |")]
    assert weights == ["| learned | 0.55 ± 0.49 | 0.45 ± 0.49 | 1 of 2 |"]


def test_the_page_says_nothing_of_the_best_source_alone_unless_each_was_tried() -> None:
    found = results(cells=[one for one in results()["cells"] if one["method"] != "only b"])
    assert "| learned | 0.55 ± 0.49 | 0.45 ± 0.49 |" in shown(found).splitlines()
    assert "source alone" not in shown(found)


def test_weights_of_another_model_are_compared_with_those_found_on_this_one() -> None:
    carried = {"method": "carried", "against": "learned", "metric": "row_loss/t", "mean": 0.1, "low": -0.1, "high": 0.3}
    cells = [*results()["cells"], *(cell("carried", seed, 2.0, weights={"a": 0.7, "b": 0.3}) for seed in (0, 1))]
    methods = [*results()["methods"], "carried"]
    found = results(about="transfer", cells=cells, methods=methods, differences=[*results()["differences"], carried])
    scores = shown(found).partition("| weights |")[0]
    assert line(scores, "method")[2:4] == ["− uniform", "− learned"]
    assert line(scores, "carried")[3] == "+0.100 [-0.100, +0.300]"


def test_the_page_says_what_speaks_against_learning() -> None:
    text = shown(results()).partition("## When not to use it")[2]
    assert "took 1.8 times the tokens" in text
    assert "a in made up (-0.010 [-0.020, -0.005] nats) was better alone" in text
    assert (
        "1 of 2 said so: made up (1). As a mix to train on, the weights were better than equal ones in 1 of these 1" in text
    )
    noise = {"method": "learned", "against": "uniform", "metric": "row_loss/t", "mean": -0.1, "low": -0.3, "high": 0.1}
    assert "In made up (-0.100 [-0.300, +0.100] nats), learned weights and equal ones are not told apart" in shown(
        results(differences=[noise])
    )
    swarm = {"method": "swarm", "against": "learned", "metric": "row_loss/t", "mean": -0.04, "low": -0.07, "high": -0.01}
    spent = {"weights": {"seconds": 30.0, "tokens": 18}, "finetuning": {"seconds": 10.0, "tokens": 5}}
    cells = [*results()["cells"], *(cell("swarm", seed, 1.7) | {"cost": spent} for seed in (0, 1))]
    assert "swarm in made up (-0.040 [-0.070, -0.010] nats, for 2.0 times the tokens)" in shown(
        results(differences=[swarm], cells=cells, methods=[*results()["methods"], "swarm"])
    )
    worse = {**noise, "mean": 0.2, "low": 0.1}
    assert "In made up, learned weights were worse than equal ones" in shown(results(differences=[{**worse, "high": 0.3}]))


def test_the_page_says_what_part_of_the_questions_is_answered() -> None:
    cells = [
        {**one, "metrics": {**one["metrics"], "exact_match/t": share}}
        for one, share in zip(results()["cells"], (0.02, 0.02, 0.06), strict=False)
    ]
    assert "answers 2.0% of the questions rightly, and at most 6.0% after" in shown(results(cells=cells, about="answers"))
    assert "questions rightly" not in shown(results())


def test_equal_weights_have_no_top_source() -> None:
    (weights,) = (one for one in shown(results()).splitlines() if one.startswith("| uniform | 0.50"))
    assert weights.endswith("| – |")


def test_what_was_planned_and_not_measured_is_named() -> None:
    import page
    from results import Results

    assert "Not measured yet: another." in page.text([Results.model_validate(results())], ["made up", "another"])


def test_missing_cells_are_counted() -> None:
    everything = results()
    assert "missing" not in shown(everything)
    assert "1 cell of the others is missing." in shown(results(cells=everything["cells"][:-1]))
    assert "2 cells of the others are missing." in shown(results(cells=[*everything["cells"][:-3], everything["cells"][-2]]))


def test_the_page_in_the_documentation_is_that_of_the_results() -> None:
    import page

    assert page.PAGE.read_text(encoding="utf-8") == page.text(page.read(), page.planned()), "run: python studies/page.py"


def test_recipes_have_no_mistakes_and_equal_budgets() -> None:
    """Without data: the sections are built, and nothing is read."""
    import study

    for case in study.read_study(ROOT / "studies" / "study.yaml"):
        recipe = Recipe.read(ROOT / case.recipe)
        for key, value in case.set.items():
            recipe.put(key, value, "study.yaml")
        settings = build_section(CompareSettings, recipe.tree["compare"], recipe, ("compare",))
        build_parts(recipe, {"problem": Problem}, load_plugins(), ignored=["solver", "backend"])
        assert settings.tokens is not None, case.name
        assert settings.finetune.steps is None, case.name
        assert settings.fresh_rows, case.name
        references = [settings.reference] if isinstance(settings.reference, str) else settings.reference or []
        assert {*references} <= {label_of(entry) for entry in settings.methods}, case.name


def test_weights_are_carried_from_where_the_earlier_comparison_is() -> None:
    import study

    case = study.Case(name="B!", about="transfer", recipe="r.yaml", after="Case A", set={"run": "{after}/seed-{seed}"})
    words = case.command(Path("there"), ["backend.name=fsdp"])
    assert words == [
        "compare", "r.yaml", "--set", 'run="there/case-a/seed-{seed}"', "--set", "backend.name=fsdp", "--output", "there/b",
    ]  # fmt: skip


def study(where: Path, entries: list[dict[str, Any]], *options: str) -> "subprocess.CompletedProcess[str]":
    """Call study.py with another study.yaml, in a copy of the scripts."""
    for name in ("study.py", "page.py", "results.py"):
        (where / "studies").mkdir(exist_ok=True)
        (where / "studies" / name).write_text((ROOT / "studies" / name).read_text())
    (where / "studies" / "study.yaml").write_text(yaml.safe_dump({"comparisons": entries}))
    return subprocess.run(
        [sys.executable, "studies/study.py", *options], cwd=where, capture_output=True, text=True, check=False
    )


def test_what_is_wrong_is_said_before_the_first_cell(tmp_path: Path) -> None:
    """The launcher stands for bilevel: it refuses one recipe, and would write a file if it were to run the other."""
    script = tmp_path / "bilevel.py"
    script.write_text(
        "import sys, pathlib\n"
        "if 'gone' in ' '.join(sys.argv): sys.exit('error: no such file: gone.jsonl')\n"
        "if '--dry-run' not in sys.argv: pathlib.Path('ran').touch()\n"
    )
    recipe = {"compare": {"tokens": 9, "finetune": {}}}
    (tmp_path / "good.yaml").write_text(json.dumps(recipe))
    (tmp_path / "gone.yaml").write_text(json.dumps(recipe))
    (tmp_path / "rows.yaml").write_text(json.dumps({"compare": {"rows": 9}}))
    entries = [{"name": name, "about": "main", "recipe": f"{name}.yaml"} for name in ("good", "gone", "rows")]
    later = {"name": "later", "about": "transfer", "recipe": "gone.yaml", "after": "good"}
    ended = study(tmp_path, entries, "--launcher", f"{sys.executable} {script}")
    assert ended.returncode == 1
    assert "gone: error: no such file: gone.jsonl" in ended.stderr
    assert "rows: its methods would train on different numbers of tokens; give compare.tokens" in ended.stderr
    assert "2 of 3 comparisons cannot be made; nothing was run" in ended.stderr
    assert not (tmp_path / "ran").exists()
    alone = study(tmp_path, [*entries, later], "later", "--launcher", f"{sys.executable} {script}")
    assert "later: it takes the weights of 'good', which is not done; name that one, too" in alone.stderr
    both = study(tmp_path, [*entries, later], "good", "later", "--check", "--launcher", f"{sys.executable} {script}")
    assert "2 comparisons can be made" in both.stdout
    changed = study(tmp_path, entries, "good", "--set", "backend.name=fsdp")
    assert "--set makes another study; say where it is to be, with --into" in changed.stderr
    unknown = study(tmp_path, entries, "better")
    assert "there is no comparison 'better'; known: good, gone, rows" in unknown.stderr
