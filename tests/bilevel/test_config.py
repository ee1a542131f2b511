from pathlib import Path

import pytest
import yaml

from bilevel import SGD, Cosine, InputError, Power, ScaleBiO
from bilevel.config import Config, load_config
from bilevel.plugins import Part, Plugins

RECIPE = """\
problem: {name: distance, size: 2}
solver:
  name: scalebio
  penalty: 20
  lr_z: 1e-5
  optimizer_x: {name: sgd, momentum: 0.9}
  warmup: 3
backend: {name: torch}
run:
  steps: 5
  output: OUT
"""


@pytest.fixture
def load(tmp_path: Path, plugins: Plugins):  # type: ignore[no-untyped-def]
    plugins.parts["problems"]["distance"] = Part("distance", "tests.conftest:Distance", "tests")

    def load(text: str = RECIPE, *changes: str, name: str = "recipe.yaml") -> Config:
        file = tmp_path / name
        file.write_text(text)
        return load_config(file, plugins, changes=changes)

    return load


def test_a_recipe_becomes_the_objects_it_names(load) -> None:  # type: ignore[no-untyped-def]
    config = load()
    assert config.problem.size == 2
    assert config.solver == ScaleBiO(penalty=20.0, lr_z=1e-5, optimizer_x=SGD(momentum=0.9), warmup=3)
    assert config.run.steps == 5


def test_all_mistakes_are_reported_at_once_each_with_its_line(load) -> None:  # type: ignore[no-untyped-def]
    text = """\
problem: {name: distance, size: many}
solver:
  name: scalebio
  penalti: 20
  lr_z: -1
  optimizer_x: {name: sgd, momentun: 0.9}
bakend: {name: torch}
active: {name: lisa, blocks: 0}
run:
  steps: 5
  outputs: OUT
  seed: yes
"""
    with pytest.raises(InputError) as found:
        load(text)
    lines = [line.partition("recipe.yaml")[2] for line in str(found.value).splitlines()]
    beginnings = [
        ":1: problem.size is 'many'", ":4: unknown key solver.penalti; did you mean 'penalty'?", ":5: solver.lr_z is -1",
        ":6: unknown key solver.optimizer_x.momentun", ":7: unknown section 'bakend'; did you mean 'backend'?",
        ":8: active: blocks must be at least 1", ":11: unknown key run.outputs; did you mean 'output'?", ":12: run.seed is true",
    ]  # fmt: skip
    assert len(lines) == len(beginnings), lines
    for line, beginning in zip(lines, beginnings, strict=True):
        assert line.startswith(beginning)


@pytest.mark.parametrize(("text", "value"), [("1e-5", 1e-5), ("2E3", 2000.0), ("-1.5e+2", -150.0), ("3", 3), ("1_0", 10)])
def test_numbers_in_scientific_notation_are_numbers(load, text: str, value: float) -> None:  # type: ignore[no-untyped-def]
    assert load(RECIPE + "  seed: 0\nactive: {name: all}\n", f"solver.lr_x={abs(value)}").solver.lr_x == abs(value)
    assert load(RECIPE.replace("size: 2", f"size: 2, noise: {text}")).problem.noise == value


def test_set_changes_values_deep_inside_and_adds_missing_ones(load) -> None:  # type: ignore[no-untyped-def]
    config = load(RECIPE, "solver.optimizer_x.momentum=0.5", "active.name=lisa", "active.blocks=3", "run.seed=7")
    assert config.solver.optimizer_x.momentum == 0.5
    assert config.active.blocks == 3
    assert config.run.seed == 7


def test_schedules_are_chosen_by_name(load) -> None:  # type: ignore[no-untyped-def]
    text = RECIPE.replace("penalty: 20", "penalty: {name: power, start: 2, exponent: 0.2}")
    solver = load(text, "solver.lr_x={name: cosine, peak: 0.1, steps: 50}").solver
    assert solver.penalty == Power(2.0, 0.2)
    assert solver.lr_x == Cosine(0.1, 50)


def test_the_resolved_recipe_builds_the_same_run_again(load) -> None:  # type: ignore[no-untyped-def]
    config = load(RECIPE, "solver.lr_x={name: cosine, peak: 0.1, steps: 50}")
    again = load(yaml.safe_dump(config.recipe))
    assert again.solver == config.solver
    assert again.recipe == config.recipe


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("penalty: 20", "penalti: 20", r"recipe\.yaml:4: unknown key solver\.penalti; did you mean 'penalty'\?"),
        ("penalty: 20", "penalty: much", r"recipe\.yaml:4: solver\.penalty is 'much'"),
        ("penalty: 20", "penalty: -2", r"recipe\.yaml:4: solver\.penalty is -2: .*greater than or equal to 0"),
        ("penalty: 20", "penalty: {name: powr, start: 1}", r"recipe\.yaml:4: solver\.penalty.*'power'"),
        ("penalty: 20", "penalty: {name: power, start: 1}", r"recipe\.yaml:4: solver\.penalty\.exponent is missing"),
        ("momentum: 0.9", "momentun: 0.9", r"recipe\.yaml:6: unknown key solver\.optimizer_x\.momentun"),
        ("name: scalebio", "name: scaleboi", r"recipe\.yaml:3: no solver is named 'scaleboi'; did you mean 'scalebio'"),
        ("steps: 5", "steps: 0", r"recipe\.yaml:10: run\.steps is 0: .*greater than or equal to 1"),
        ("  steps: 5\n", "", r"run\.steps is missing"),
        ("run:", "runs:", r"recipe\.yaml:9: unknown section 'runs'; did you mean 'run'"),
        ("backend: {name: torch}\n", "", r"backend\.name is missing"),
        ("warmup: 3", "warmup: 3\n  warmup: 4", r"recipe\.yaml:8: the key solver\.warmup is given twice"),
        ("penalty: 20", "penalty: [20", r"recipe\.yaml:\d+: not valid YAML"),
    ],
)
def test_mistakes_are_named_by_file_line_and_key(load, old: str, new: str, message: str) -> None:  # type: ignore[no-untyped-def]
    assert old in RECIPE
    with pytest.raises(InputError, match=message):
        load(RECIPE.replace(old, new))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("solver.penalti=3", r"--set solver\.penalti=3: unknown key solver\.penalti; did you mean 'penalty'"),
        ("solver.penalty", "write key=value"),
        ("solver.penalty.deep=1", "has no keys|nothing at"),
        ("solver.lr_x=[", "not valid YAML"),
    ],
)
def test_mistakes_in_set_are_named_by_the_option(load, change: str, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=message):
        load(RECIPE, change)


def test_a_recipe_that_is_not_there_or_not_a_mapping_is_refused(load, tmp_path: Path, plugins: Plugins) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match="cannot be read"):
        load_config(tmp_path / "none.yaml", plugins)
    with pytest.raises(InputError, match="a recipe is a mapping"):
        load("- 1\n")


def test_a_python_recipe_may_hold_objects_and_functions(load) -> None:  # type: ignore[no-untyped-def]
    text = """
from bilevel import ScaleBiO
from tests.conftest import Distance

recipe = {
    "problem": Distance(size=4),
    "solver": ScaleBiO(penalty=lambda t: 1.0 + t),
    "backend": {"name": "torch"},
    "run": {"steps": 3, "output": "OUT"},
}
"""
    config = load(text, "run.steps=4", name="recipe.py")
    assert config.problem.size == 4
    assert config.run.steps == 4
    assert config.recipe["solver"]["class"] == "bilevel.solvers.scalebio:ScaleBiO"
    yaml.safe_dump(config.recipe)  # can be kept


def test_a_python_recipe_that_fails_says_why(load) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match="ZeroDivisionError"):
        load("1 / 0", name="recipe.py")
    with pytest.raises(InputError, match="named `recipe`"):
        load("x = 1", name="recipe.py")
