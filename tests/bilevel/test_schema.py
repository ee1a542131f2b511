"""Editors are told what a recipe may hold."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from bilevel.plugins import Plugins, load_plugins
from bilevel.schema import schema_text

ROOT = Path(__file__).parents[2]
RECIPES = [*ROOT.glob("examples/plans/*/recipe.yaml"), ROOT / "examples/python_docs/recipe.yaml"]


@pytest.fixture(scope="module")
def schema() -> Any:
    return json.loads(schema_text(load_plugins()))


def test_every_recipe_of_the_examples_is_valid(schema: Any) -> None:
    validator = Draft202012Validator(schema)
    for file in RECIPES:
        assert [error.message for error in validator.iter_errors(yaml.safe_load(file.read_text()))] == [], file


@pytest.mark.parametrize(
    "change",
    [
        {"run": {"stepz": 3}},
        {"solver": {"name": "nothing"}},
        {"active": {"name": "lisa", "block": 2}},
        {"run": {"steps": 0}},
    ],
)
def test_a_mistake_is_seen(schema: Any, change: dict[str, Any]) -> None:
    recipe = yaml.safe_load(RECIPES[0].read_text())
    assert not Draft202012Validator(schema).is_valid({**recipe, **change})


def test_settings_say_what_they_mean(schema: Any, plugins: Plugins) -> None:
    rounds = next(part for part in schema["properties"]["solver"]["oneOf"] if part["title"] == "rounds")
    assert rounds["properties"]["lr_z"]["description"].startswith("the step size of y and z")
    assert {part["title"] for part in schema["properties"]["solver"]["oneOf"]} == set(plugins.parts["solvers"])
