"""What a part of a recipe can be told: its settings, their defaults and meanings, as its class states them."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from bilevel.active import ActiveRule
from bilevel.errors import InputError
from bilevel.plain import to_plain
from bilevel.plugins import Part, Plugins
from bilevel.run_settings import RunSettings
from bilevel.suggest import did_you_mean

_MEANING = re.compile(r"(\w+(?:, \w+)*): (\S.*)")


@dataclass(frozen=True)
class Setting:
    """A key of a recipe's section.

    kind: the values that it takes, as the class writes them.
    default: as a recipe would write it; None: it must be given.
    meaning: empty where the class does not say.
    """

    name: str
    kind: str
    default: str | None
    meaning: str


def describe(name: str, plugins: Plugins) -> RenderableType:
    """Everything that has this name: problems, solvers, backends, baselines ..., rules for `active`, or the section `run`.

    Raises `InputError` if nothing has, with the nearest name, and for a part that cannot be loaded.
    """
    found = [
        _titled(f"{kind[:-1]} {name} (plugin {part.plugin})", part.load())
        for kind, part in _parts(plugins)
        if part.name == name
    ]
    if name in rules():
        found.append(_titled(f"active rule {name}", rules()[name]))
    if name == "run":
        found.append(_titled("the section run", RunSettings))
    if not found:
        known = sorted({part.name for _, part in _parts(plugins)} | rules().keys() | {"run"})
        raise InputError(f"nothing is named {name!r}{did_you_mean(name, known)}; `bilevel list` shows what there is")
    return Group(*found)


def settings_of(cls: type) -> list[Setting]:
    """The settings of a dataclass, in the order of its fields."""
    meanings: dict[str, str] = {}
    for ancestor in reversed(cls.__mro__):
        meanings |= _meanings(ancestor.__dict__.get("__doc__") or "")
    return [
        Setting(f.name, _kind(f.type), _default(f), meanings.get(f.name, ""))
        for f in dataclasses.fields(cls)
        if f.init and f.name != "name"
    ]


def rules() -> dict[str, type]:
    """The rules for `active`, by name."""
    return {rule.name: rule for rule in get_args(get_args(ActiveRule)[0])}


def summary_of(cls: Any) -> str:
    """What a class is: the first paragraph of its docstring, in one line."""
    return " ".join(inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0].split())


def _parts(plugins: Plugins) -> Iterator[tuple[str, Part]]:
    return ((kind, part) for kind, parts in plugins.parts.items() if kind != "commands" for part in parts.values())


def _titled(title: str, cls: Any) -> RenderableType:
    """A heading, what the class is, and a table of its settings."""
    summary = summary_of(cls)
    heading = Text(title, style="bold")
    if not dataclasses.is_dataclass(cls):
        return Group(heading, summary, "")
    table = Table("setting", Column("default", overflow="fold"), "meaning", box=None, header_style="bold", pad_edge=False)
    first: dict[str, str] = {}  # meaning -> the setting that has it
    for setting in settings_of(cls):  # type: ignore[arg-type]
        same = first.setdefault(setting.meaning or setting.name, setting.name)
        meaning = setting.meaning if same == setting.name else f"as {same}"
        default = "must be given" if setting.default is None else setting.default
        table.add_row(setting.name, default, meaning or Text(setting.kind, style="dim"))
    return Group(heading, summary, "", table, "") if table.row_count else Group(heading, summary, "it has no settings", "")


def _meanings(docstring: str) -> dict[str, str]:
    """The lines `name: meaning` of a docstring, with those that continue them: they are indented."""
    found: dict[str, str] = {}
    current: list[str] = []
    for line in inspect.cleandoc(docstring).splitlines():
        if described := _MEANING.fullmatch(line):
            current = described[1].split(", ")
            found |= dict.fromkeys(current, described[2])
        elif line.startswith("    ") and current:
            found |= {name: f"{found[name]} {line.strip()}" for name in current}
        else:
            current = []
    return found


def _kind(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def _default(field: dataclasses.Field[Any]) -> str | None:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return None
    return _written(to_plain(value))


def _written(plain: Any) -> str:
    """Plain data as a recipe has it in one line."""
    if isinstance(plain, dict):
        named = {"name": plain["name"], **plain} if "name" in plain else plain
        return "{" + ", ".join(f"{key}: {_written(value)}" for key, value in named.items()) + "}"
    if isinstance(plain, list):
        return "[" + ", ".join(map(_written, plain)) + "]"
    return plain if isinstance(plain, str) and plain else json.dumps(plain)
