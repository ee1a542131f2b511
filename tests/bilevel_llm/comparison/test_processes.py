"""A comparison under a launcher finds what one process finds."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from bilevel import All
from bilevel.plugins import load_plugins
from bilevel.recipe import Recipe
from bilevel.run_settings import RunSettings
from bilevel_llm.comparison.methods import Parts, make_methods
from bilevel_llm.reweighting.problem import LLMReweighting
from tests.bilevel_backends.distributed.conftest import NO_GPU, environment, launch
from tests.bilevel_llm.comparison.conftest import bilevel
from tests.bilevel_llm.tiny import write_rows
from tests.studies.test_study import study
from tests.warm.python import warm_python

METHODS: list[Any] = [
    "uniform", "learned", "odm", "doremi", {"name": "swarm", "runs": 5, "steps": 2}, {"name": "less", "share": 0.5, "lr": 1e-3},
]  # fmt: skip


def test_two_processes_compare_like_one(recipe: Callable[..., Path], tmp_path: Path) -> None:
    """ZeRO-2 over gloo against the torch backend, in float32. 1e-4: sums in another order, over a few dozen steps of Adam."""
    sums = [{"prompt": f"{a}+1?", "completion": f"#### {a + 1}"} for a in range(7)]
    answers = write_rows(tmp_path / "sums.jsonl", sums)
    test = yaml.safe_load(recipe().read_text())["compare"]["test"]
    where = recipe(
        methods=METHODS, test=[*test, {"name": "sums", "path": answers, "metrics": ["exact_match", "loss"]}],
        max_new_tokens=4, finetune={"lr": 1e-3, "batch_size": 8},
    )  # fmt: skip
    tree = yaml.safe_load(where.read_text())
    tree["problem"] |= {"batch_size": 6, "validation_batch_size": 6}  # processes take equal parts
    tree["backend"]["dtype"] = "float32"
    where.write_text(yaml.safe_dump(tree))
    bilevel("compare", where, "--output", tmp_path / "one")

    tree["backend"] = {"name": "deepspeed", "zero_stage": 2, "dtype": "float32"}
    where.write_text(yaml.safe_dump(tree))
    ended = launch("-m", "bilevel", "compare", str(where), "--output", str(tmp_path / "two"), cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("draws it") == 1
    one, two = (json.loads((tmp_path / name / "comparison.json").read_text()) for name in ("one", "two"))
    assert [(cell["method"], cell["seed"]) for cell in two["cells"]] == [
        (cell["method"], cell["seed"]) for cell in one["cells"]
    ]
    for alone, shared in zip(one["cells"], two["cells"], strict=True):
        assert shared["metrics"] == pytest.approx(alone["metrics"], rel=1e-4), alone["method"]
        assert shared.get("weights") == pytest.approx(alone.get("weights"), abs=1e-4), alone["method"]
        assert shared.get("mix") == alone.get("mix")
    for method in ("uniform", "less"):
        lines = [(tmp_path / n / "cells" / method / "seed-0" / "answers-sums.jsonl").read_text() for n in ("one", "two")]
        assert len(lines[0].splitlines()) == 7
        assert lines[0] == lines[1]


def test_a_slow_process_removes_nothing_that_the_first_has_written(
    recipe: Callable[..., Path], problem: Callable[..., LLMReweighting], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second process comes to a cell of `uniform`, which nobody waits in, when the first has done it."""
    data = problem()
    data.prepare()
    parts = Parts(Recipe.read(recipe()), load_plugins(), lambda seed: data, [0], RunSettings(4), All())
    (method,) = make_methods(["uniform"], parts)
    for number in ("0", "1"):
        monkeypatch.setenv("RANK", number)
        method.find(0, tmp_path / "weights")
    assert (tmp_path / "weights" / "weights.json").is_file()


def test_a_study_runs_under_a_launcher_with_other_settings_and_in_a_place_of_its_own(
    recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = recipe(methods=["uniform"], tokens=300, rows=None, finetune={"lr": 1e-3, "batch_size": 2})
    entries = [{"name": "first", "about": "main", "recipe": str(where), "set": {"problem.batch_size": 6}}]
    changes = ("problem.validation_batch_size=6", "backend={name: fsdp, dtype: float32}")
    options = [word for change in changes for word in ("--set", change)]
    for key, value in environment(**NO_GPU, PYTHON_EXEC=warm_python()).items():
        monkeypatch.setenv(key, value)
    launcher = f"{warm_python()} -m torch.distributed.run --standalone --nproc-per-node 2 -m bilevel"
    ended = study(tmp_path, entries, "--launcher", launcher, *options, "--into", str(tmp_path / "there"))
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr
    assert json.loads((tmp_path / "there/results/first.json").read_text())["cells"][-1]["method"] == "uniform"
    assert "| uniform |" in (tmp_path / "there/page.md").read_text()
    assert not (tmp_path / "studies/results").exists()
