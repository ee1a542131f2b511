import io
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from rich.console import Console

from bilevel import InputError, ScaleBiO
from bilevel.describe import Setting, describe, settings_of
from bilevel.plugins import Part, Plugins


@dataclass
class Parent:
    """A parent.

    depth: how deep; with a line
        that goes on.
    """

    depth: int


@dataclass
class Child(Parent):
    """A child.

    low, high: the range.

    Of another matter: nothing.
    """

    low: float = 1e-5
    high: float | None = None
    options: dict[str, Any] = field(default_factory=lambda: {"name": "sgd", "momentum": 0.9})
    kind: Literal["a", "b"] = "a"


def printed(name: str, plugins: Plugins) -> str:
    console = Console(width=100, file=io.StringIO())
    with console.capture() as captured:
        console.print(describe(name, plugins))
    return captured.get()


def test_settings_have_the_defaults_of_the_fields_and_the_meanings_of_the_docstrings() -> None:
    assert settings_of(Child) == [
        Setting("depth", "int", None, "how deep; with a line that goes on."),
        Setting("low", "float", "1e-05", "the range."),
        Setting("high", "float | None", "null", "the range."),
        Setting("options", "dict[str, typing.Any]", "{name: sgd, momentum: 0.9}", ""),
        Setting("kind", "Literal['a', 'b']", "a", ""),
    ]


def test_a_part_is_described_with_what_must_be_given_and_what_the_defaults_are(plugins: Plugins) -> None:
    plugins.parts["problems"]["child"] = Part("child", f"{__name__}:Child", "tests")
    text = printed("child", plugins)
    rows = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert "must be given" in rows["depth"]
    assert "as low" in rows["high"]
    assert "Literal" in rows["kind"]


@pytest.mark.parametrize("name", ["lisa", "all", "run", "torch", "doremi"])
def test_everything_that_a_recipe_names_can_be_described(name: str, plugins: Plugins) -> None:
    assert name in printed(name, plugins)


def test_every_setting_of_the_flagship_solver_has_a_meaning() -> None:
    assert [setting.name for setting in settings_of(ScaleBiO) if not setting.meaning] == []


def test_a_name_that_nothing_has_is_refused_with_the_nearest_one(plugins: Plugins) -> None:
    with pytest.raises(InputError, match="nothing is named 'scalebo'; did you mean 'scalebio'"):
        describe("scalebo", plugins)
