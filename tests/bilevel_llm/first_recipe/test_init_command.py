"""`bilevel init` writes a recipe that runs, with the reason of each setting."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from bilevel.cli import app
from bilevel.config import load_config
from bilevel.errors import InputError
from bilevel.plugins import Plugins
from bilevel_llm.first_recipe.measured import Measured
from bilevel_llm.first_recipe.step_size import STEPS, StepSize, Trial
from bilevel_llm.first_recipe.text import recipe_text
from tests.bilevel_llm.tiny import sentences, write_rows


@pytest.fixture
def words(
    model_directory: Callable[[str], Path], data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    monkeypatch.chdir(tmp_path)
    sources = [word for name in ("clean", "noise") for word in ("--source", f"{name}={data[name]}")]
    return ["init", "--model", str(model_directory("llama")), *sources, "--target", data["target"], "--device", "cpu"]


def invoke(words: list[str]) -> str:
    return CliRunner().invoke(app, words, catch_exceptions=False).output


def test_it_measures_step_size_time_and_memory_and_writes_a_recipe_that_can_be_run(
    words: list[str], plugins: Plugins, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bilevel_llm.first_recipe.step_size.TRIED", (1e-3, 3e-3))
    shown = invoke(words)
    text = Path("recipe.yaml").read_text()
    assert text in shown
    assert "bilevel run recipe.yaml" in shown
    assert text.startswith("# yaml-language-server: $schema=bilevel.schema.json\n")
    assert Path("bilevel.schema.json").is_file()
    assert "# Expected here: about" in text
    assert f"# change of the training loss in {STEPS} steps: 0.001: " in text
    config = load_config(Path("recipe.yaml"), plugins)
    assert getattr(config.solver, "lr_z") == 1e-3  # noqa: B009
    assert not Path("runs").exists()
    with pytest.raises(InputError, match="nothing is overwritten"):
        invoke(words)


def test_rows_are_not_cut_but_for_a_few_and_a_batch_is_dealt_to_folds(
    words: list[str], tmp_path: Path, plugins: Plugins
) -> None:
    few = write_rows(tmp_path / "few.jsonl", sentences(7, 12))
    invoke([*words, "--source", f"few={few}", "--no-probe"])
    problem = yaml.safe_load(Path("recipe.yaml").read_text())["problem"]
    assert problem["batch_size"] == 3  # one of each: a fold of the twelve rows has one
    assert problem["max_length"] % 16 == 0
    assert "# Nothing was probed" in Path("recipe.yaml").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--source", "one={few}"], r"'one' has 3 usable rows.*give it 5 or more"),
        (["--output", "nowhere/recipe.yaml"], "in a folder that exists"),
        (["--output", "recipe.json"], "name a .yaml file"),
    ],
)
def test_what_cannot_be_used_is_refused(words: list[str], change: list[str], message: str, tmp_path: Path) -> None:
    few = write_rows(tmp_path / "few.jsonl", sentences(7, 3))
    with pytest.raises(InputError, match=message):
        invoke([*words, *(word.format(few=few) for word in change), "--no-probe"])


def test_one_source_alone_is_refused(words: list[str]) -> None:
    with pytest.raises(InputError, match="there is one; name two or more"):
        invoke([*words[:5], *words[7:]])


@pytest.mark.parametrize(
    ("falls", "lr", "moves"),
    [((0.0, 0.01, 0.05, 0.03), 3e-6, True), ((0.0, 0.02, float("nan")), 1e-6, True), ((0.0, -0.01), 1e-6, False)],
    ids=["one below the best", "not finite", "nothing moves"],
)
def test_the_step_size_is_the_one_below_that_with_the_largest_fall(falls: tuple[float, ...], lr: float, moves: bool) -> None:
    found = StepSize([Trial(lr, fall) for lr, fall in zip((1e-6, 3e-6, 1e-5, 3e-5), falls, strict=False)])
    assert (found.lr, found.falls) == (lr, moves)


def test_names_and_paths_are_text_in_the_recipe() -> None:
    odd = ["yes", "a: b", "#1", "x, y", "*", "1e5", "ü.jsonl", "{a}"]
    tree = {
        "problem": {
            "model": "null", "sources": [{"name": name, "path": [name, "b"]} for name in odd], "validation": [{"path": "~/a b"}],
            "max_length": 16, "batch_size": 8,
        },
        "solver": {"horizon": 20, "penalty": 1, "lr_z": 1e-5}, "backend": {"name": "torch"}, "active": {"name": "all"},
        "run": {"at_most": 9, "output": "on", "checkpoint_every": 5},
    }  # fmt: skip
    text = recipe_text(Measured(tree, dict.fromkeys([*odd, "target"], 5), 1.0, 9))
    read = yaml.safe_load(text)
    assert read["problem"]["sources"] == tree["problem"]["sources"]
    assert (read["problem"]["model"], read["run"]["output"]) == ("null", "on")
