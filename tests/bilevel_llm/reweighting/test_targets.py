"""The mix for each validation set alone: runs that are made for it, and what is claimed of their answers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from bilevel import InputError
from bilevel.account import Account
from bilevel.config import load_config
from bilevel.plugins import Plugins, load_plugins
from bilevel_llm.reweighting.target_runs import mixes_of_targets
from bilevel_llm.reweighting.targets import ALL, Mix, comparisons

Weights = dict[str, float]


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return load_plugins()


@pytest.fixture(scope="module")
def finished(
    model_directory: Callable[[str], Path], data: dict[str, str], plugins: Plugins, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run with two targets, of which a batch has 2 and 2 rows."""
    where = tmp_path_factory.mktemp("finished")
    shutil.copy(data["target"], where / "target.jsonl")
    recipe = {
        "problem": {
            "name": "llm-reweighting",
            "model": str(model_directory("llama")),
            "sources": [{"name": name, "path": data[name]} for name in ("clean", "noise")],
            "validation": [
                {"name": "words", "path": str(where / "target.jsonl"), "weight": 3},
                {"name": "a/b", "path": data["other"]},
            ],
            "max_length": 32,
            "batch_size": 2,
            "validation_batch_size": 4,
            "lora": {"rank": 1},
        },
        "solver": {"name": "rounds", "horizon": 2, "folds": 2, "lr_z": 1e-2},
        "backend": {"name": "torch", "device": "cpu"},
        "run": {"steps": 4, "output": str(where / "run")},
    }
    file = where / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    load_config(file, plugins).fit()
    return where


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished / "run", tmp_path / "run"))


def test_each_target_has_a_run_of_its_own_whose_answer_stands_beside_that_for_all(run: Path, plugins: Plugins) -> None:
    mixes = mixes_of_targets(run, plugins)
    assert [mix.target for mix in mixes] == [ALL, "words", "a/b"]
    assert all(sum(mix.weights.values()) == pytest.approx(1) for mix in mixes)
    own = {
        directory.name: yaml.safe_load((directory / "recipe.yaml").read_text()) for directory in (run / "targets").iterdir()
    }
    assert own.keys() == {"1-words", "2-a-b"}
    assert [v["name"] for v in own["2-a-b"]["problem"]["validation"]] == ["a/b"]
    assert all(recipe["problem"]["validation_batch_size"] == 2 for recipe in own.values())
    learned = json.loads((run / "targets" / "1-words" / "weights.json").read_text())["average"]
    assert mixes[1].weights == pytest.approx(learned)
    said = Account.read(run / "account.json")
    table = next(table for table in said.tables if table.title == "The mix for each target alone")
    assert list(table.columns) == ["source", ALL, "words", "a/b"]
    assert [finding.sentence for finding in said.findings if finding.name == "targets"] == comparisons(mixes)
    kept = json.loads((run / "targets.json").read_text())
    assert [mix["target"] for mix in kept["mixes"]] == [ALL, "words", "a/b"]


def test_what_is_finished_is_not_done_again(run: Path, plugins: Plugins, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(run, run / "targets" / "1-words")
    shutil.copytree(run, run / "targets" / "2-a-b", ignore=shutil.ignore_patterns("targets"))
    monkeypatch.setattr("bilevel.config.Config.fit", lambda *a, **k: pytest.fail("it was done again"))
    for _ in range(2):
        mixes_of_targets(run, plugins)
    said = Account.read(run / "account.json")
    assert [table.title for table in said.tables].count("The mix for each target alone") == 1


def change(run: Path, **problem: Any) -> None:
    file = run / "recipe.yaml"
    recipe = yaml.safe_load(file.read_text())
    recipe["problem"] |= problem
    file.write_text(yaml.safe_dump(recipe))


def one_target(run: Path) -> None:
    change(run, validation=yaml.safe_load((run / "recipe.yaml").read_text())["problem"]["validation"][:1])


def changed_rows(run: Path) -> None:
    other = run / "target.jsonl"
    other.write_text('{"instruction": "a", "input": "", "output": "b"}\n')
    sets = yaml.safe_load((run / "recipe.yaml").read_text())["problem"]["validation"]
    change(run, validation=[{**sets[0], "path": str(other)}, sets[1]])


def longer(run: Path) -> None:
    file = run / "recipe.yaml"
    file.write_text(file.read_text().replace("steps: 4", "steps: 6"))


def made_in_python(run: Path) -> None:
    file = run / "recipe.yaml"
    recipe = yaml.safe_load(file.read_text())
    recipe["solver"] = {"class": "bilevel.solvers.rounds:Rounds", "fields": {}}
    file.write_text(yaml.safe_dump(recipe))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (one_target, "has one validation set, 'words': its weights are those for this target alone"),
        (changed_rows, "the validation data 'words' have changed since"),
        (longer, r"is not at its end; go on with it first \(bilevel run .*recipe.yaml --resume\)"),
        (made_in_python, "was made in Python, from objects that a recipe cannot name"),
    ],
)
def test_what_cannot_be_answered_is_refused_before_anything_runs(
    run: Path, plugins: Plugins, spoil: Callable[[Path], None], words: str
) -> None:
    spoil(run)
    with pytest.raises(InputError, match=words):
        mixes_of_targets(run, plugins)
    assert not (run / "targets").exists()


def mix(target: str, low: float | None = None, high: float = 1.0) -> Mix:
    ends = {} if low is None else {"web": (low, high), "books": (1 - high, 1 - low)}
    return Mix(target, {"web": 0.5, "books": 0.5}, ends, "use", 10)


def test_only_intervals_that_do_not_meet_tell_targets_apart() -> None:
    everything = mix(ALL, 0.4, 0.5)
    assert comparisons([everything, mix("chat", 0.6, 0.8), mix("math", 0.1, 0.59)]) == [
        "'chat' wants more of 'web' than 'math' does: 0.60 to 0.80, against 0.10 to 0.59",
        "'math' wants more of 'books' than 'chat' does: 0.41 to 0.90, against 0.20 to 0.40",
    ]
    assert comparisons([everything, mix("chat", 0.6, 0.8), mix("math", 0.1, 0.61)]) == [
        "the targets are not told apart: for every source, their intervals overlap"
    ]
    assert comparisons([everything, mix("chat", 0.6, 0.8), mix("math")]) == [
        "no intervals for 'math': nothing is claimed about what the target wants"
    ]
