"""What entries of `compare.methods` mean, and what seeds have of their own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from bilevel import InputError
from tests.bilevel_llm.comparison.conftest import bilevel
from tests.bilevel_llm.tiny import sentences, write_rows

Make = Callable[..., Path]


def cells(out: Path) -> dict[tuple[str, int], dict[str, Any]]:
    content = json.loads((out / "comparison.json").read_text())
    return {(cell["method"], cell["seed"]): cell for cell in content["cells"]}


def with_samples(recipe: Path, **sampled: dict[str, int]) -> Path:
    """The recipe, in which some sources (and `validation`) are samples of their rows."""
    tree = yaml.safe_load(recipe.read_text())
    for data in (*tree["problem"]["sources"], *tree["problem"]["validation"]):
        data |= sampled.get(data.get("name", "validation"), {})
    recipe.write_text(yaml.safe_dump(tree))
    return recipe


def test_an_entry_may_learn_with_a_solver_of_its_own(recipe: Make, tmp_path: Path) -> None:
    solver = {"name": "scalebio", "penalty": 1, "lr_x": 1.0, "lr_z": 1e-3, "warmup": 0}
    other = {"name": "learned", "label": "fast", "solver": solver, "steps": 3, "active": {"name": "lisa", "blocks": 1}}
    bilevel("compare", recipe(methods=["learned", other]))
    runs = {label: tmp_path / "out" / "cells" / label / "seed-0" / "weights" for label in ("learned", "fast")}
    kept = {label: yaml.safe_load((run / "recipe.yaml").read_text()) for label, run in runs.items()}
    assert [kept[label]["solver"]["lr_x"] for label in runs] == [0.1, 1.0]
    assert [kept[label]["run"]["steps"] for label in runs] == [4, 3]
    assert [kept[label]["active"]["name"] for label in runs] == ["all", "lisa"]
    assert len((runs["fast"] / "metrics.jsonl").read_text().splitlines()) == 3
    bilevel("report", runs["fast"], "--output", tmp_path / "report.html")  # it is a run as any other
    with pytest.raises(InputError, match=r"the method fast\.steps was 3 and is now 5"):
        bilevel("compare", recipe(methods=["learned", {**other, "steps": 5}]))


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"solver": {"name": "scalebi"}}, "'scalebi'.*did you mean 'scalebio'"),
        ({"solver": {"name": "scalebio", "lr_xx": 1}}, r"recipe\.yaml:\d+: unknown key solver\.lr_xx"),
        ({"steps": 0}, r"run\.steps"),
        ({"penalty": 3}, "unknown key compare.methods.1.penalty; known here: name, label, solver, active, steps"),
    ],
)
def test_what_is_wrong_with_an_entry_is_said_before_work_starts(
    recipe: Make, tmp_path: Path, own: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        bilevel("compare", recipe(methods=["uniform", {"name": "learned", **own}]))
    assert not (tmp_path / "out" / "cells").exists()


def test_single_sources_are_a_method_for_each_source(recipe: Make, tmp_path: Path) -> None:
    bilevel("compare", recipe(methods=["uniform", "single-sources"], reference="only clean"))
    found = cells(tmp_path / "out")
    for name in ("clean", "other", "noise"):
        weights = found[f"only {name}", 0]["weights"]
        assert weights == {source: float(source == name) for source in ("clean", "other", "noise")}
        assert found[f"only {name}", 0]["mix"]["sources"][name] == 40
    mine = {"name": "only clean", "weights": {"clean": 1, "other": 1, "noise": 1}}
    with pytest.raises(InputError, match="two methods are called 'only clean'"):
        bilevel("compare", recipe(methods=[mine, "single-sources"]), "--output", tmp_path / "other")
    with pytest.raises(InputError, match=r"compare\.reference is 'only cleen'.*did you mean 'only clean'"):
        bilevel("compare", recipe(methods=["single-sources"], reference="only cleen"), "--output", tmp_path / "other")


def test_fresh_rows_give_each_seed_a_sample_of_its_own(recipe: Make, tmp_path: Path, data: dict[str, str]) -> None:
    """`clean` is sampled by the seed, `other` has a sample that is named, `noise` is whole."""
    where = with_samples(
        recipe(methods=["uniform", "learned"], seeds=[0, 1], fresh_rows=True, rows=36),
        clean={"max_rows": 12}, other={"max_rows": 12, "sample_seed": 5}, validation={"max_rows": 10},
    )  # fmt: skip
    bilevel("compare", where)
    drawn = [
        {(at["source"], at["row"]) for line in mix.read_text().splitlines() for at in [json.loads(line)["_bilevel"]]}
        for mix in ((tmp_path / "out" / "cells" / "uniform" / f"seed-{seed}" / "mix.jsonl") for seed in (0, 1))
    ]
    of_source = [{name: {row for source, row in rows if source == name} for name in data} for rows in drawn]
    assert of_source[0]["clean"] != of_source[1]["clean"]
    assert of_source[0]["other"] == of_source[1]["other"]
    samples = [
        yaml.safe_load((tmp_path / "out" / "cells" / "learned" / f"seed-{seed}" / "weights" / "recipe.yaml").read_text())
        for seed in (0, 1)
    ]
    for seed, sample in enumerate(samples):
        assert [source["sample_seed"] for source in sample["problem"]["sources"]] == [seed, 5, None]
        assert sample["problem"]["validation"][0]["sample_seed"] == seed
    hashes = [
        json.loads((tmp_path / "out" / "cells" / "learned" / f"seed-{seed}" / "weights" / "weights.json").read_text())
        for seed in (0, 1)
    ]
    assert [found["data"]["sources"]["clean"]["rows"] for found in hashes] == [12, 12]

    before = (tmp_path / "out" / "comparison.json").read_text()
    assert "is a sample of" not in before, "that is so of every method"
    bilevel("compare", where, "--set", "compare.seeds=[0,1,2]")
    after = cells(tmp_path / "out")
    assert [cell for key, cell in after.items() if key[1] < 2] == json.loads(before)["cells"]
    assert ("learned", 2) in after


def test_a_test_row_that_only_another_seed_has_is_left_out_for_all(
    recipe: Make, tmp_path: Path, data: dict[str, str]
) -> None:
    """The validation file stands in the test file as a whole; each seed samples 5 of its 30 rows."""
    target = [json.loads(line) for line in Path(data["target"]).read_text().splitlines()]
    test = write_rows(tmp_path / "with-target.jsonl", [*sentences(9, 20), *target])
    where = recipe(methods=["uniform"], seeds=[0], fresh_rows=True, test=[{"path": test}])
    bilevel("compare", with_samples(where, validation={"max_rows": 9}))
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["test"]["test"]["dropped"] >= len(target)


def test_fresh_rows_need_something_to_sample(recipe: Make, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"fresh_rows.*give them max_rows, and no sample_seed"):
        bilevel("compare", recipe(fresh_rows=True))
    assert not (tmp_path / "out" / "cells").exists()


def test_a_run_for_each_seed_is_named_by_the_seed(recipe: Make, tmp_path: Path) -> None:
    bilevel("compare", recipe(methods=["learned"], seeds=[0, 1]), "--output", tmp_path / "first")
    run = str(tmp_path / "first" / "cells" / "learned" / "seed-{seed}" / "weights")
    bilevel("compare", recipe(methods=["uniform", {"name": "carried", "run": run}], seeds=[0, 1]))
    learned, carried = cells(tmp_path / "first"), cells(tmp_path / "out")
    for seed in (0, 1):
        assert carried["carried", seed]["weights"] == pytest.approx(learned["learned", seed]["weights"])
    assert carried["carried", 0]["weights"] != carried["carried", 1]["weights"]
    with pytest.raises(InputError, match=r"seed-2"):
        bilevel("compare", recipe(methods=["uniform", {"name": "carried", "run": run}], seeds=[0, 1, 2]))


def test_methods_can_be_compared_with_several_of_them(recipe: Make, tmp_path: Path) -> None:
    bilevel("compare", recipe(methods=["uniform", "single-sources"], reference=["uniform", "only clean"]))
    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    pairs = {
        (found["method"], found["against"]): found["mean"]
        for found in content["differences"]
        if "row_loss" in found["metric"]
    }
    others = {"base", "only other", "only noise"}
    assert set(pairs) == {(m, r) for m in others for r in ("uniform", "only clean")} | {("only clean", "uniform")}
    shift = pairs["only clean", "uniform"]
    assert pairs["only noise", "only clean"] == pytest.approx(pairs["only noise", "uniform"] - shift)


def test_what_is_so_of_several_methods_is_said_once(recipe: Make, tmp_path: Path) -> None:
    """`noise` has too few rows for either."""
    own = [{"name": name, "weights": {"clean": 0.2, "other": 0, "noise": 0.8}} for name in ("one", "two")]
    bilevel("compare", recipe(methods=["uniform", *own], seeds=[0, 1], rows=50, max_repeats=1))
    findings = [f["sentence"] for f in json.loads((tmp_path / "out" / "comparison.json").read_text())["findings"]]
    (short,) = (sentence for sentence in findings if "fewer than its weight asks" in sentence)
    assert short.startswith("one, two, seeds 0, 1: 'noise' gives")


def test_a_dry_run_says_what_there_is_to_do_and_leaves_nothing(recipe: Make, tmp_path: Path) -> None:
    entries: list[Any] = ["uniform", "learned", "single-sources"]
    shown = bilevel("compare", recipe(methods=entries, seeds=[0, 1]), "--dry-run")
    assert "learned: 2 cells to do" in shown
    assert "only noise: 2 cells to do" in shown
    assert "base: 1 cell to do" in shown
    assert not (tmp_path / "out").exists()
    bilevel("compare", recipe(methods=["uniform"]))
    assert "uniform: 1 cell to do, 1 done" in bilevel("compare", recipe(methods=["uniform"], seeds=[0, 1]), "--dry-run")
    with pytest.raises(InputError, match="no such file"):
        bilevel("compare", recipe(test=[{"path": "no-such.jsonl"}]), "--dry-run", "--output", tmp_path / "new")
