"""`run.loggers` of a recipe: names, or mappings with settings, of loggers that any plugin may register."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from bilevel import InputError, Logger, hookimpl
from bilevel.config import Config, load_config
from bilevel.loggers.mlflow import MLflow
from bilevel.loggers.trackio import Trackio
from bilevel.loggers.wandb import Wandb
from bilevel.plugins import Part, Plugins
from bilevel.recipe import Recipe
from bilevel.run_settings import RunSettings

Load = Callable[..., Config]


@dataclass(frozen=True)
class Lines(Logger):
    """Writes a line a step."""

    file: Path
    name: Literal["lines"] = "lines"

    @hookimpl
    def bilevel_step_end(self, record: Any) -> None:
        with self.file.open("a") as lines:
            lines.write(f"{record.step}\n")


@pytest.fixture
def load(tmp_path: Path, plugins: Plugins) -> Load:
    plugins.parts["problems"]["distance"] = Part("distance", "tests.conftest:Distance", "tests")
    plugins.parts["loggers"]["lines"] = Part("lines", "tests.bilevel.test_run_loggers:Lines", "tests")
    plugins.parts["loggers"]["part"] = Part("part", "tests.conftest:Distance", "tests")

    def load(loggers: Any, *changes: str, steps: int = 2) -> Config:
        run = {"steps": steps, "output": str(tmp_path / "run"), "loggers": loggers}
        solver = {"name": "scalebio", "lr_x": 0.04, "lr_z": 0.3}
        backend = {"name": "torch", "device": "cpu"}
        tree = {"problem": {"name": "distance"}, "solver": solver, "backend": backend, "run": run}
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(tree))
        return load_config(file, plugins, changes=changes)

    return load


@pytest.mark.parametrize(
    ("written", "built"),
    [
        ([], []),
        (None, []),
        ("wandb", [Wandb()]),
        (["wandb", "trackio"], [Wandb(), Trackio()]),
        ({"name": "mlflow", "experiment": "mixes"}, [MLflow(experiment="mixes")]),
        ([{"name": "wandb", "mode": "offline", "tags": ["a"]}], [Wandb(mode="offline", tags=["a"])]),
    ],
    ids=str,
)
def test_loggers_are_named_in_short_or_with_settings(load: Load, written: Any, built: list[Logger]) -> None:
    assert list(load(written).run.loggers) == built


def test_loggers_can_be_set_on_the_command_line(load: Load) -> None:
    assert list(load([], "run.loggers=[wandb]").run.loggers) == [Wandb()]
    assert list(load(["wandb"], "run.loggers=").run.loggers) == []


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (["wandbb"], "no logger is named 'wandbb'; did you mean 'wandb'"),
        ([{"name": "mlflow", "experimen": "a"}], r"unknown key run.loggers.0.experimen; did you mean 'experiment'"),
        (["trackio", {"name": "wandb", "mode": "maybe"}], "run.loggers.1.mode is 'maybe'"),
        ([3], "run.loggers.0 is 3; write the name of a logger"),
        ([{"project": "a"}], "run.loggers.0 is {'project': 'a'}; write the name of a logger"),
        ([{"name": 3}], "run.loggers.0.name is 3"),
        (["trackio", "trackio"], "run.loggers has 'trackio' more than once"),
        (["part"], "logger 'part': .*Distance must extend bilevel.Logger, and have a field `name`"),
        ([{"name": "mlflow", "tracking_uri": "https://me:secret@host"}], "run.loggers.0.tracking_uri: there is a password"),
    ],
    ids=["name", "key", "value", "number", "no name", "odd name", "twice", "no logger", "password"],
)
def test_what_is_wrong_is_said_with_its_place(load: Load, written: Any, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        load(written)
    assert "recipe.yaml:" in str(caught.value) or written == ["part"]
    assert "secret" not in str(caught.value)


def test_a_logger_of_another_package_follows_the_run_and_is_kept_in_the_recipe(load: Load, tmp_path: Path) -> None:
    entry = {"name": "lines", "file": str(tmp_path / "lines.txt")}
    load([entry]).fit()
    assert (tmp_path / "lines.txt").read_text() == "0\n1\n"
    assert Recipe.read(tmp_path / "run" / "recipe.yaml").tree["run"]["loggers"] == [entry]


def test_a_run_may_be_resumed_with_other_loggers(load: Load, tmp_path: Path) -> None:
    load([]).fit()
    load([{"name": "lines", "file": str(tmp_path / "lines.txt")}], steps=4).fit(resume=True)
    assert (tmp_path / "lines.txt").read_text() == "2\n3\n"
    load([], steps=5).fit(resume=True)


def test_a_logger_made_in_python_is_written_as_a_recipe_names_it(plugins: Plugins, tmp_path: Path) -> None:
    tree = {
        "problem": {"name": "quadratic"},
        "solver": {"name": "scalebio", "lr_x": 0.04, "lr_z": 0.3},
        "backend": {"name": "torch"},
        "run": {"steps": 2, "output": "run", "loggers": [MLflow(experiment="mixes")]},
    }
    resolved = load_config(Recipe(tree, {}, "python"), plugins).recipe["run"]["loggers"]
    again = {**tree, "run": {"steps": 2, "output": "run", "loggers": resolved}}
    assert list(load_config(Recipe(again, {}, "python"), plugins).run.loggers) == [MLflow(experiment="mixes")]


def test_the_section_takes_loggers_alone() -> None:
    from pydantic import TypeAdapter, ValidationError

    with pytest.raises(ValidationError):
        TypeAdapter(RunSettings).validate_python({"steps": 3, "loggers": [3]})
