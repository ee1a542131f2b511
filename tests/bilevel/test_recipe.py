"""Recipes that hold what no setting can be are refused, by file, line and key, and soon."""

import math
from pathlib import Path

import pytest

from bilevel import InputError
from bilevel.config import load_config
from bilevel.plugins import Part, Plugins
from bilevel.recipe import Recipe, dump

BOMB = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1]\n" + "\n".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]" for i in range(1, 12)
)
RECIPE = "problem: {name: distance}\nsolver: {name: scalebio}\nbackend: {name: torch}\nrun: {steps: 5, output: out}\n"

TEXTS = {
    "a tag on something else": ('run: {steps: !!int "x"}', r":1: 'x' cannot be read as int"),
    "a tag on nothing": ("a: !!int ", r":1: '' cannot be read as int"),
    "a date": ("a: !!timestamp 2024-01-01", r":1: the tag .*timestamp' has no meaning"),
    "code": ("a: !!python/object/apply:os.system [ls]", r":1: the tag .* has no meaning"),
    "a set": ("a: !!set {x}", r":1: the tag .* has no meaning"),
    "a bell": ('a: "\x07"', r":1: not valid YAML: it has control characters"),
    "an escaped escape": ('\nrun: {output: "a\\e[31m"}', r":2: run\.output has control characters"),
    "half a character": ('run: {output: "\\ud800"}', r":1: run\.output has control characters"),
    "a number as key": ("problem: {1: 2}", r":1: the key '1' is not text; put it in quotes"),
    "a list as key": ("? [a]\n: 1", r":1: a list or mapping as key is not text"),
    "a list in itself": ("a: &a [*a]", r":1: an alias that contains itself"),
    "a mapping in itself": ("a: &a {b: *a}", r":1: an alias that contains itself"),
    "brackets": ("a: " + "[" * 1500 + "]" * 1500, "nested more than 50 deep"),
    "indents": ("\n".join(" " * depth + "a:" for depth in range(1500)), ":50: .*nested more than 50 deep"),
    "an alias bomb": (BOMB, "aliases make this more than"),
    "digits": ("run: {steps: " + "9" * 5000 + "}", r":1: '9{40}…' cannot be read as int"),
    "a key twice in a line": ("a: {b: 1, b: 2}", r"a\.b is given twice"),
}


@pytest.mark.parametrize(("text", "message"), TEXTS.values(), ids=TEXTS)
def test_a_text_that_no_recipe_can_be_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        Recipe.read(file).check_values()


@pytest.mark.parametrize(
    ("text", "value"), [("2024-01-01", "2024-01-01"), ("2024-13-45", "2024-13-45"), ("1:30", "1:30"), ("010", 10)]
)
def test_what_looks_like_a_date_a_time_or_an_octal_number_is_not_turned_into_another_number(
    text: str, value: object
) -> None:
    recipe = Recipe({}, {}, "test")
    recipe.set(f"key={text}")
    assert recipe.tree == {"key": value}


@pytest.fixture
def load(tmp_path: Path, plugins: Plugins):  # type: ignore[no-untyped-def]
    plugins.parts["problems"]["distance"] = Part("distance", "tests.conftest:Distance", "tests")
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE)
    return lambda *changes, **options: load_config(file, plugins, changes=changes, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("²=1", "unknown section '²'"),
        ("solver.name={a: 1}", r"solver\.name is {'a': 1}"),
        ("solver.penalty=.inf", r"solver\.penalty is inf; give a finite number"),
        ("solver.penalty=1e400", r"solver\.penalty is inf; give a finite number"),
        ("solver.penalty=yes", r"solver\.penalty is true, and a number is needed"),
        ("solver.optimizer_x={name: adamw, betas: [1, 1]}", r"optimizer_x\.betas\.0 is 1: .*less than 1"),
        ("solver.optimizer_x={name: sgd, momentum: 2}", r"optimizer_x\.momentum is 2: .*less than 1"),
        ("solver.optimizer_x={name: sgd, clip: 0}", r"optimizer_x\.clip is 0: .*greater than 0"),
        ("solver.optimizer_x={name: sgd, clip: .nan}", r"optimizer_x\.clip is nan; give a finite number"),
        ("solver.optimizer_x={name: adamw, eps: 0}", r"optimizer_x\.eps is 0: .*greater than 0"),
        ("solver.lr_x={name: cosine, peak: -1, steps: 3}", r"peak is -1: .*greater than or equal to 0"),
        ("solver.lr_x={name: cosine, paek: 1, steps: 3}", r"peak is missing; there is 'paek'"),
        ("run.steps=1000000000000000000", r"run\.steps is a number of 19 digits, which is too large"),
        ("run.steps=1000000000001", r"run\.steps is 1000000000001: .*less than or equal to 1000000000000"),
        ("run.seed=-1", r"run\.seed is -1"),
        ('run.output=""', r"run\.output is empty"),
        ("active={name: lisa, layers: 2}", r"unknown key active\.layers; known: blocks"),
        ("active={name: all, blocks: 3}", r"unknown key active\.blocks"),
    ],
)
def test_a_value_out_of_range_is_named_by_its_key(load, change: str, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=f"--set .*{message}"):
        load(change)


@pytest.mark.parametrize(
    "name", ["my dir #2", "123", "yes", "2024-01-01", "a: b", "{x}", "[1]", "*a", "null", "x=y", "ü 😀"]
)
def test_the_output_option_is_text(load, name: str) -> None:  # type: ignore[no-untyped-def]
    assert load(output=name).run.output == name


def test_a_python_recipe_that_exits_is_an_error_of_the_recipe(tmp_path: Path, plugins: Plugins) -> None:
    file = tmp_path / "recipe.py"
    file.write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(InputError, match=r"recipe\.py fails: SystemExit"):
        load_config(file, plugins)


def test_a_schedule_that_overflows_is_infinite_and_therefore_refused() -> None:
    from bilevel.schedule import Power, at

    assert math.isinf(Power(1e300, 1e10)(5))
    with pytest.raises(ValueError, match="is inf at step 5"):
        at(Power(1e300, 1e10), 5)


def test_a_recipe_that_is_written_is_read_back_as_it_was(tmp_path: Path) -> None:
    tree = {
        "data": {
            "[web]": "a",
            "on": "b",
            "2024": {"~": None, "1e5": [1, 2.5, True, "1e-5", 1e-5, "2024-01-01", "010", "yes", ".inf"]},
        }
    }
    (tmp_path / "recipe.yaml").write_text(dump(tree))
    assert Recipe.read(tmp_path / "recipe.yaml").tree == tree
