"""No key of a recipe is ignored, at any depth, in any registered part."""

import dataclasses
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from bilevel import InputError
from bilevel.active import ActiveRule
from bilevel.config import build_section
from bilevel.plugins import load_plugins
from bilevel.recipe import Recipe
from bilevel.run_settings import RunSettings
from bilevel_llm.comparison.settings import CompareSettings

FOREIGN = "no_such_setting"
ALSO: dict[str, dict[str, Any]] = {"CompareSettings": {"rows": 3}}
"""What a class needs beside the fields without a default."""
PLAIN: dict[Any, Any] = {str: "text", int: 3, float: 0.5, bool: True, dict: {}, Any: "text"}


def example(hint: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Values that fit a type, each with the path of one mapping in it that becomes a dataclass; () for none."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        yield from settings(hint)
    elif origin is typing.Annotated:
        yield from example(arguments[0])
    elif origin in (typing.Union, types.UnionType):
        for argument in arguments:
            yield from example(argument)
    elif origin in (list, tuple) or getattr(origin, "__name__", "") == "Sequence":
        for value, inner in example(arguments[0]):
            several = [value, {**value, "name": "other"}] if isinstance(value, dict) and "name" in value else [value]
            yield several, (0, *inner) if inner is not None else None
    elif origin in (dict,) or getattr(origin, "__name__", "") == "Mapping":
        for value, inner in example(arguments[1]):
            yield {"a": value}, ("a", *inner) if inner is not None else None
    elif origin is typing.Literal:
        yield arguments[0], None
    else:
        yield PLAIN.get(hint), None


def settings(kind: Any) -> Iterator[tuple[dict[str, Any], tuple[Any, ...]]]:
    """Mappings that become the class: the least one, and one for each nested class."""
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = [f for f in dataclasses.fields(kind) if f.init]
    missing = dataclasses.MISSING
    least = {
        f.name: next(example(hints[f.name]))[0]
        for f in fields
        if (f.default is missing and f.default_factory is missing) or f.name in ("name", "per")
    } | ALSO.get(kind.__name__, {})
    yield least, ()
    for f in fields:
        for value, inner in example(hints[f.name]):
            if inner is not None:
                yield {**least, f.name: value}, (f.name, *inner)


def parts() -> Iterator[Any]:
    plugins = load_plugins()
    for kind in ("problems", "solvers", "backends", "baselines"):
        for name, part in sorted(plugins.parts[kind].items()):
            yield pytest.param(part.load, id=f"{kind[:-1]}-{name}")
    for name, rule in (("active", ActiveRule), ("run", RunSettings), ("compare", CompareSettings)):
        yield pytest.param(lambda rule=rule: rule, id=name)


@pytest.mark.parametrize("load", list(parts()))
def test_a_foreign_key_is_an_error_that_names_it_and_its_place(load: Callable[[], Any]) -> None:
    kind = load()
    cases = list(settings(kind)) if dataclasses.is_dataclass(kind) else list(example(kind))
    assert cases
    for values, path in cases:
        recipe = Recipe({}, {}, "test.yaml")
        node = recipe.tree["section"] = values
        for step in path:
            node = node[step]
        node[FOREIGN] = 1
        with pytest.raises(InputError) as caught:
            build_section(kind, values, recipe, ("section",))
        dotted = ".".join(map(str, ("section", *path, FOREIGN)))
        assert f"unknown key {dotted}" in str(caught.value)
