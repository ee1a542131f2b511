"""`bilevel baseline`: what it writes, third-party methods, and bad input, said before a model is loaded."""

import json
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import pytest
import yaml

from bilevel import InputError, RunError
from bilevel.cli import app
from bilevel.config import load_config
from bilevel.plugins import Plugins, load_plugins
from bilevel_llm.baselines import run as command
from bilevel_llm.reweighting.problem import LLMReweighting

METHODS = ["uniform", "proportional", "temperature", "doremi", "odm", "less", "swarm"]


@pytest.fixture
def recipe(tmp_path: Path, model_directory: Callable[[str], Path], data: dict[str, str]) -> Path:
    tree = {
        "problem": {
            "name": "llm-reweighting",
            "model": str(model_directory("llama")),
            "sources": [{"name": name, "path": data[name]} for name in ("clean", "other", "noise")],
            "validation": [{"path": data["target"]}],
            "max_length": 64,
            "batch_size": 10,
        },
        "solver": {"name": "scalebio", "lr_x": 0.1, "warmup": 1},
        "backend": {"name": "torch", "device": "cpu"},
        "run": {"steps": 3, "output": str(tmp_path / "run")},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "recipe.yaml"


@pytest.fixture(autouse=True)
def first_party(plugins: Plugins, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bilevel.plugins.load_plugins", lambda: plugins)


def baseline(*words: str | Path) -> None:
    app(["baseline", *map(str, words)], standalone_mode=False)


def read(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "weights.json").read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", METHODS)
def test_the_directory_is_that_of_a_run(method: str, recipe: Path, tmp_path: Path, plugins: Plugins) -> None:
    """Whoever reads the weights of `bilevel run` can read these, and the other way round."""
    load_config(recipe, plugins, output=str(tmp_path / "learned")).fit()
    baseline(method, recipe)
    learned, weighed = read(tmp_path / "learned"), read(tmp_path / "run")
    assert learned.keys() - {"targets", "granularity", "intervals", "verdict"} <= weighed.keys()
    for key in ("data", "model", "versions", "seed"):
        assert learned[key] == weighed[key]
    assert sum(weighed["sources"].values()) == pytest.approx(1)
    assert list(weighed["sources"]) == list(learned["sources"])
    assert weighed["average"] == weighed["sources"]
    assert weighed["method"]["name"] == method
    assert set(weighed["cost"]) == {"seconds", "tokens", "backward_tokens"}
    assert (weighed["cost"]["tokens"] > 0) == (method in ("doremi", "odm", "less", "swarm"))
    resolved = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert resolved["baseline"]["name"] == method
    assert "solver" not in resolved


def test_the_recipe_that_was_kept_gives_the_same_weights(recipe: Path, tmp_path: Path) -> None:
    baseline("temperature", recipe, "--set", "baseline.temperature=2")
    baseline("temperature", tmp_path / "run" / "recipe.yaml", "--output", tmp_path / "again")
    assert read(tmp_path / "again")["sources"] == read(tmp_path / "run")["sources"]
    assert read(tmp_path / "run")["method"] == {"name": "temperature", "temperature": 2.0, "by": "rows"}


def test_a_selection_names_file_line_and_score_of_every_row(recipe: Path, tmp_path: Path, data: dict[str, str]) -> None:
    baseline("less", recipe, "--set", "baseline.share=0.2", "--set", "baseline.dimension=64")
    rows = [json.loads(line) for line in (tmp_path / "run" / "selection.jsonl").read_text().splitlines()]
    assert len(rows) == 19 == read(tmp_path / "run")["selection"]["rows"]
    scores = [row["score"] for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert len({(row["source"], row["row"]) for row in rows}) == 19
    shares = read(tmp_path / "run")["sources"]
    for row in rows:
        assert row["file"] == data[row["source"]]
        assert 1 <= row["number"] <= len(Path(row["file"]).read_text().splitlines())
    assert shares == {name: pytest.approx(sum(row["source"] == name for row in rows) / 19) for name in shares}


def test_less_keeps_what_its_settings_mean(recipe: Path, tmp_path: Path) -> None:
    """A key of its own stands above them, and the recipe that is kept gives the same."""
    words = ("--set", "baseline.settings=paper", "--set", "baseline.dimension=64", "--set", "baseline.rank=2")
    baseline("less", recipe, *words, "--set", "run.steps=4")
    found = read(tmp_path / "run")
    assert {key: found["method"][key] for key in ("checkpoints", "lr", "share")} == {
        "checkpoints": 4,
        "lr": 2e-5,
        "share": 0.05,
    }
    assert any("dimension=64 (paper: 8192), rank=2 (paper: 128)" in f["sentence"] for f in found["findings"])
    baseline("less", tmp_path / "run" / "recipe.yaml", "--output", tmp_path / "again")
    assert read(tmp_path / "again")["method"] == found["method"]
    assert read(tmp_path / "again")["sources"] == found["sources"]


def test_doremi_is_resumed_after_an_interruption(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    longer = ("--set", "run.steps=5", "--set", "run.checkpoint_every=2")
    baseline("doremi", recipe, *longer, "--output", tmp_path / "whole")
    original, calls = LLMReweighting.lower_batch, [0]

    def failing(self: LLMReweighting, index: int, shard: Any) -> Any:
        calls[0] += 1
        if index == 4:
            raise RunError("the machine went away")
        return original(self, index, shard)

    monkeypatch.setattr(LLMReweighting, "lower_batch", failing)
    with pytest.raises(RunError, match="went away"):
        baseline("doremi", recipe, *longer)
    monkeypatch.undo()
    monkeypatch.setattr("bilevel.plugins.load_plugins", lambda: load_plugins(own_points()))
    baseline("doremi", recipe, *longer, "--resume")
    assert read(tmp_path / "run")["sources"] == read(tmp_path / "whole")["sources"]
    assert read(tmp_path / "run")["cost"]["tokens"] == read(tmp_path / "whole")["cost"]["tokens"]


def own_points() -> list[EntryPoint]:
    return [point for point in entry_points(group="bilevel") if point.name.startswith("bilevel")]


OTHERS = """
from dataclasses import dataclass
from bilevel import hookimpl
from bilevel_llm.baselines.base import Outcome, Baseline

@hookimpl
def bilevel_baselines(register):
    register("favourite", "others_baseline:Favourite")

@dataclass(frozen=True)
class Favourite(Baseline):
    name_of: str
    share: float = 1.0
    def find(self, task):
        others = [name for name in task.problem.source_tables if name != self.name_of]
        return Outcome({self.name_of: self.share, **{name: 0.0 for name in others}})
"""


@pytest.fixture
def with_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "others_baseline.py").write_text(OTHERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("others_baseline", None)
    loaded = load_plugins([*own_points(), EntryPoint("others", "others_baseline", "bilevel")])
    monkeypatch.setattr("bilevel.plugins.load_plugins", lambda: loaded)


@pytest.mark.usefixtures("with_plugin")
def test_a_plugin_can_bring_a_baseline(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    app(["list"], standalone_mode=False)
    assert "favourite" in capsys.readouterr().out
    baseline("favourite", recipe, "--set", "baseline.name_of=other")
    assert read(tmp_path / "run")["sources"] == {"clean": 0, "other": 1, "noise": 0}


@pytest.mark.usefixtures("with_plugin")
@pytest.mark.parametrize(
    ("changes", "message"), [("share=0.7", "not a distribution"), ("name_of=nobody", "the sources are")]
)
def test_what_a_method_gives_is_checked(recipe: Path, tmp_path: Path, changes: str, message: str) -> None:
    with pytest.raises(RunError, match=message):
        baseline("favourite", recipe, "--set", "baseline.name_of=other", "--set", f"baseline.{changes}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["temprature"], "no baseline is named 'temprature'; did you mean 'temperature'"),
        (
            ["temperature", "--set", "baseline.temperatur=3"],
            r"unknown key baseline\.temperatur; did you mean 'temperature'",
        ),
        (["temperature", "--set", "baseline.temperature=0"], r"baseline: temperature must be positive"),
        (["less", "--set", "baseline.share=2"], "share must be above 0"),
        (["less", "--set", "baseline.settings=papr"], r"baseline\.settings is 'papr'"),
        (["less", "--set", "baseline.gradients=jacobian"], r"baseline\.gradients is 'jacobian'"),
        (["less", "--set", "baseline.name=doremi"], "'doremi', and 'less' was asked for"),
        (["less", "--set", "baseline.warmup_steps=99"], r"more than the budget run\.steps=3"),
        (["swarm", "--set", "baseline.runs=3"], "3 runs do not determine a law of 3 sources"),
        (["swarm", "--set", "baseline.ridge=0"], "ridge must be positive"),
        (["less", "--resume"], "less keeps nothing to resume from"),
        (["doremi", "--set", "run.steps=1", "--set", "baseline.reference_steps=1"], "leaves none for the proxy"),
        (["doremi", "--resume"], "there is no run to resume"),
        (["uniform", "--set", "problem={name: quadratic}"], "only data of an llm-reweighting problem"),
        (["uniform", "--set", "mystery={}"], "unknown section 'mystery'"),
    ],
)
def test_bad_input_is_named_before_a_model_is_loaded(
    recipe: Path, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LLMReweighting, "lower", lambda self: pytest.fail("a model was loaded"))
    with pytest.raises(InputError, match=message):
        baseline(words[0], recipe, *words[1:])


def test_nothing_is_overwritten(recipe: Path, tmp_path: Path) -> None:
    baseline("uniform", recipe)
    before = (tmp_path / "run" / "weights.json").read_bytes()
    with pytest.raises(InputError, match="holds another run"):
        baseline("proportional", recipe)
    assert (tmp_path / "run" / "weights.json").read_bytes() == before


def test_a_baseline_that_was_killed_before_its_weights_can_be_given_again(recipe: Path, tmp_path: Path) -> None:
    baseline("uniform", recipe)
    weights = tmp_path / "run" / "weights.json"
    whole = weights.read_bytes()
    weights.unlink()
    with pytest.raises(InputError, match="holds another run"):  # it is not another method's
        baseline("proportional", recipe)
    baseline("uniform", recipe)
    assert weights.read_bytes() == whole
    weights.unlink()
    (tmp_path / "run" / "mine.txt").touch()
    with pytest.raises(InputError, match="holds another run"):
        baseline("uniform", recipe)


def test_a_run_does_not_take_the_recipe_of_a_baseline_for_its_own(recipe: Path, tmp_path: Path, plugins: Plugins) -> None:
    baseline("uniform", recipe)
    with pytest.raises(InputError, match=r"solver\.name is missing"):
        load_config(tmp_path / "run" / "recipe.yaml", plugins)


def test_only_the_first_process_writes(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    baseline("uniform", recipe)
    assert not (tmp_path / "run").exists()
    assert command.rank() == 1
