"""Build the objects of a run from a recipe. Errors name the file, the line and the key."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from bilevel.active import ActiveRule
from bilevel.backend import Backend
from bilevel.errors import InputError
from bilevel.logger import Logger
from bilevel.loop import Result
from bilevel.observer import Observer
from bilevel.plain import name_of, to_plain
from bilevel.plugins import Plugins
from bilevel.problem import Problem
from bilevel.recipe import Recipe
from bilevel.run_settings import RunSettings
from bilevel.solver import Solver
from bilevel.suggest import did_you_mean, nearest

ABSENT = ("missing", "missing_argument")
EXTRA = ("unexpected_keyword_argument", "extra_forbidden")
OBJECTS: Mapping[str, type] = {"problem": Problem, "solver": Solver, "backend": Backend}


@dataclass(frozen=True)
class Config:
    """All that one run needs, built and checked; `recipe` is the same as plain data, with every default filled in."""

    problem: Problem[Any]
    solver: Solver[Any]
    backend: Backend
    active: ActiveRule
    run: RunSettings
    recipe: Mapping[str, Any]

    def fit(self, *, resume: bool = False, observer: Observer | None = None) -> Result:
        """Carry out the run; see `bilevel.fit`."""
        return self.run.fit(
            self.problem,
            self.solver,
            self.backend,
            active=self.active,
            resume=resume,
            recipe=self.recipe,
            observer=observer,
        )


def load_config(
    recipe: Path | Recipe, plugins: Plugins, *, changes: Sequence[str] = (), output: str | None = None
) -> Config:
    """Read a recipe and build the parts that it names.

    recipe: a YAML file, or a Python file that defines a mapping `recipe` of the same form, in which `problem`, `solver` and
        `backend` may also be objects; or a recipe that has been read already.
    changes: `key.path=value`, applied in order.
    output: replaces `run.output`.

    Raises `InputError` naming file, line and key, with the nearest known name for a misspelled one.
    """
    if isinstance(recipe, Path):
        recipe = read_recipe(recipe)
    _apply(recipe, changes, output)
    built, resolved = build_parts(recipe, OBJECTS, plugins)
    return Config(recipe=resolved, **built)


def read_recipe(file: Path, *, changes: Sequence[str] = (), output: str | None = None) -> Recipe:
    """Read a recipe and apply the changes, without building anything; see `load_config`."""
    recipe = _read_python(file) if file.suffix == ".py" else Recipe.read(file)
    _apply(recipe, changes, output)
    return recipe


def build_parts(
    recipe: Recipe, objects: Mapping[str, type], plugins: Plugins, *, ignored: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Build the sections of a recipe that a command needs.

    objects: section -> base class of the registered part that it names; `active` and `run` are built in any case.
    ignored: sections that the recipe may have without their being used. It may also have sections that are named like a
        plugin's command, which reads them.

    Returns the objects by section, and the same as plain data with every default filled in. Raises `InputError` with a line
    for everything that is wrong.
    """
    wrong = _wrong_sections(recipe, objects, [*ignored, *plugins.parts["commands"]])
    made: dict[str, Any] = {}
    for section in (*objects, "active", "run"):
        if section not in wrong:
            try:
                made[section] = _build(recipe, section, objects, plugins)
            except InputError as error:
                wrong[section] = str(error)
    if wrong:
        order = [*recipe.tree, *objects, "active", "run"]
        raise InputError("\n".join(wrong[section] for section in sorted(wrong, key=order.index) if wrong[section]))
    built, active, run = {kind: made[kind] for kind in objects}, made["active"], made["run"]
    resolved = {
        **{kind: {**_identity(recipe.tree[kind]), **to_plain(part)} for kind, part in built.items()},
        "active": to_plain(active),
        "run": to_plain(run),
    }
    return {**built, "active": active, "run": run}, resolved


def _apply(recipe: Recipe, changes: Sequence[str], output: str | None) -> None:
    for change in changes:
        recipe.set(change)
    if output is not None:
        recipe.put("run.output", output, f"--output {output}")
    recipe.check_values()


def _read_python(file: Path) -> Recipe:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise InputError(f"the recipe {file} cannot be read")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise InputError(f"the recipe {file} fails: {type(error).__name__}: {error}") from error
    tree = getattr(module, "recipe", None)
    if not isinstance(tree, Mapping):
        raise InputError(f"{file}: a Python recipe must define a mapping named `recipe`, of the same form as a YAML recipe")
    return Recipe(_copy(tree), {}, str(file))


def _copy(tree: Any) -> Any:
    """A copy of the tree's mappings and lists, so that `--set` does not change the user's."""
    if isinstance(tree, Mapping):
        return {key: _copy(value) for key, value in tree.items()}
    return [_copy(value) for value in tree] if isinstance(tree, list | tuple) else tree


def _identity(section: Any) -> dict[str, str]:
    return {"name": section["name"]} if isinstance(section, dict) else {"class": name_of(section)}


def _wrong_sections(recipe: Recipe, objects: Mapping[str, type], ignored: Sequence[str]) -> dict[str, str]:
    """What is wrong with whole sections, by their names."""
    sections = [*objects, "active", "run"]
    unknown = [key for key in recipe.tree if key not in sections and key not in ignored]
    wrong = {key: f"{recipe.where([key])}: unknown section {key!r}{did_you_mean(key, sections)}" for key in unknown}
    meant = {nearest(key, sections) for key in unknown}
    for section in sections:
        if section in meant and section not in recipe.tree:
            wrong[section] = ""  # it is there, under another name
            continue
        value = recipe.tree.setdefault(section, {}) if section in objects else recipe.tree.get(section, {})
        if not isinstance(value, dict | objects.get(section, dict)):
            wrong[section] = f"{recipe.where([section])}: {section} must be a mapping, not {value!r}"
        elif section in objects and isinstance(value, dict) and "name" not in value and "class" in value:
            wrong[section] = (
                f"{recipe.where([section])}: {section} was made in Python ({value['class']}), which YAML cannot do; resume "
                "this run by the recipe in Python, or by `fit(..., resume=True)`"
            )
        elif section in objects and isinstance(value, dict) and "name" not in value:
            wrong[section] = f"{recipe.where([section])}: {section}.name is missing; `bilevel list` shows the choices"
    return wrong


def _build(recipe: Recipe, section: str, objects: Mapping[str, type], plugins: Plugins) -> Any:
    """Build one section. Raises `InputError`."""
    if section in objects:
        return _build_part(recipe, section, objects[section], plugins)
    if section == "active":
        return build_section(ActiveRule, recipe.tree.get("active", {"name": "all"}), recipe, ("active",))
    run = build_section(RunSettings, _with_loggers(recipe, plugins), recipe, ("run",))
    if not run.output:
        raise InputError(f"{recipe.where(['run', 'output'])}: run.output is {'missing' if run.output is None else 'empty'}")
    return run


def _build_part(recipe: Recipe, kind: str, base: type, plugins: Plugins) -> Any:
    given = recipe.tree[kind]
    if isinstance(given, base):
        return given
    section = dict(given)
    cls = _class_of(kind, section.pop("name"), recipe, (kind,), plugins)
    return build_section(cls, section, recipe, (kind,))


def _class_of(kind: str, name: Any, recipe: Recipe, path: tuple[str | int, ...], plugins: Plugins) -> Any:
    """The dataclass that the section at `path` names. Raises `InputError`."""
    where = recipe.where([*path, "name"])
    if not isinstance(name, str):
        raise InputError(f"{where}: {'.'.join(map(str, path))}.name is {name!r}; `bilevel list` shows the choices")
    try:
        cls = plugins.find(f"{kind}s", name).load()
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    if not dataclasses.is_dataclass(cls):
        raise InputError(f"{kind} {name!r}: {cls!r} is not a dataclass, so a recipe cannot build it")
    return cls


def _with_loggers(recipe: Recipe, plugins: Plugins) -> dict[str, Any]:
    """The section run, with an object for each logger that it names. Raises `InputError` with a line for each wrong one."""
    section = dict(recipe.tree.get("run", {}))
    given = [] if section.get("loggers") is None else section["loggers"]
    entries: list[tuple[Any, tuple[str | int, ...]]] = [(given, ("run", "loggers"))]
    if isinstance(given, list | tuple):
        entries = [(entry, ("run", "loggers", index)) for index, entry in enumerate(given)]
    built, wrong = [], []
    for entry, path in entries:
        try:
            built.append(_build_logger(entry, recipe, path, plugins))
        except InputError as error:
            wrong.append(str(error))
    names = [getattr(logger, "name", None) for logger in built]
    for name in {name: None for name in names if name is not None and names.count(name) > 1}:
        wrong.append(f"{recipe.where(['run', 'loggers'])}: run.loggers has {name!r} more than once")
    if wrong:
        raise InputError("\n".join(wrong))
    return {**section, "loggers": built}


def _build_logger(entry: Any, recipe: Recipe, path: tuple[str | int, ...], plugins: Plugins) -> Logger:
    if isinstance(entry, Logger):
        return entry
    section = {"name": entry} if isinstance(entry, str) else entry
    if not isinstance(section, Mapping) or "name" not in section:
        where = ".".join(map(str, path))
        raise InputError(
            f"{recipe.where(path)}: {where} is {entry!r}; write the name of a logger, or a mapping with a `name` "
            "and settings; `bilevel list` shows the loggers"
        )
    cls = _class_of("logger", section["name"], recipe, path, plugins)
    if not issubclass(cls, Logger) or "name" not in {field.name for field in dataclasses.fields(cls)}:
        raise InputError(f"logger {section['name']!r}: {name_of(cls)} must extend bilevel.Logger, and have a field `name`")
    built: Logger = build_section(cls, section, recipe, path)
    return built


def build_section(kind: Any, values: Mapping[str, Any], recipe: Recipe, path: tuple[str | int, ...]) -> Any:
    """Validate a section and build its class. Raises `InputError` with a line for each key that is wrong, naming file, line
    and key, with what to do."""
    names = [field.name for field in dataclasses.fields(kind) if field.init] if dataclasses.is_dataclass(kind) else None
    unknown = {} if names is None else _unknown_keys(values, names, recipe, path)
    known = {key: value for key, value in values.items() if key not in unknown}
    wrong = list(unknown.values())
    try:
        built = _builder(kind).validate_python(known)
        wrong += _misused(known, built, recipe, path)
    except ValidationError as error:
        wrong += _explain(error, recipe, path, {nearest(key, names or ()) for key in unknown})
        explained = {item["loc"][0] for item in error.errors() if item["loc"]}
        rest = {key: value for key, value in known.items() if key not in explained}
        with suppress(ValidationError, TypeError, OverflowError):  # what these say is not about the rest
            wrong += _misused(rest, _builder(kind).validate_python(rest), recipe, path)
    except (TypeError, OverflowError) as error:  # of a class's own checks, which pydantic lets through
        wrong.append(f"{recipe.where(path)}: {'.'.join(map(str, path))}: {error}")
    if wrong:
        raise InputError("\n".join(wrong))
    return built


@functools.cache
def _builder(kind: Any) -> TypeAdapter[Any]:
    """What builds a class from its settings; making it takes longer than to use it."""
    return TypeAdapter(kind)


def _misused(given: Any, built: Any, recipe: Recipe, path: tuple[str | int, ...]) -> Iterator[str]:
    """What is wrong with keys, at any depth, that what was built of them does not have: they would be ignored.

    Likewise with a truth value that was taken for a number (YAML reads `yes` as true). This looks at the objects and not at
    their types, so that no union, and no class that forgot to forbid other keys, can let one pass.
    """
    if isinstance(given, Mapping) and isinstance(built, list | tuple):  # a short form
        if _is_one_of(given, built):
            yield from _misused(given, built[0], recipe, path)
        elif len(given) == len(built):  # names and what they stand for
            for (key, value), inner in zip(given.items(), built, strict=True):
                yield from _misused(value, inner, recipe, (*path, key))
    elif isinstance(given, Mapping):
        settings = dataclasses.is_dataclass(built)
        unknown = {}
        if settings and given is not built:
            names = [field.name for field in dataclasses.fields(built) if field.init]
            unknown = _unknown_keys(given, names, recipe, path)
            yield from unknown.values()
        for key, value in given.items():
            inner = getattr(built, key, None) if settings else built.get(key) if isinstance(built, Mapping) else None
            if key not in unknown:
                yield from _misused(value, inner, recipe, (*path, key))
    elif isinstance(given, list | tuple) and isinstance(built, list | tuple) and len(given) == len(built):
        for index, (value, inner) in enumerate(zip(given, built, strict=True)):
            yield from _misused(value, inner, recipe, (*path, index))
    elif isinstance(given, bool) and isinstance(built, int | float) and not isinstance(built, bool):
        where = ".".join(map(str, path))
        yield f"{recipe.where(path)}: {where} is {str(given).lower()}, and a number is needed"


def _is_one_of(given: Mapping[str, Any], built: Sequence[Any]) -> bool:
    """Whether a mapping is the settings of the only object of a list, and not its name with such settings."""
    if len(built) != 1 or not dataclasses.is_dataclass(built[0]) or all(isinstance(v, Mapping) for v in given.values()):
        return False
    return bool(given.keys() & {field.name for field in dataclasses.fields(built[0])})


def _unknown_keys(
    given: Mapping[str, Any], names: Sequence[str], recipe: Recipe, path: tuple[str | int, ...]
) -> dict[str, str]:
    """What to say of each key that is none of the names."""
    return {
        key: f"{recipe.where([*path, key])}: unknown key {'.'.join(map(str, (*path, key)))}{did_you_mean(str(key), names)}"
        for key in given
        if key not in names
    }


def _explain(
    error: ValidationError, recipe: Recipe, path: tuple[str | int, ...], meant: Collection[str | None]
) -> list[str]:
    """One line for each key that is wrong (pydantic has one for each branch of a union that did not fit).

    meant: keys that are there, but misspelled.
    """
    lines: dict[str, str] = {}
    items = sorted(error.errors(), key=lambda item: not item["type"].startswith("union_tag"))  # the most telling one first
    for item in items:
        if item["type"] in ABSENT and len(item["loc"]) == 1 and item["loc"][0] in meant:
            continue
        where = [*path, *_keys(item["loc"], recipe, path, absent=item["type"] in (*ABSENT, *EXTRA))]
        dotted = ".".join(map(str, where))
        problem = item["msg"].removeprefix("Value error, ")
        if item["type"] in ABSENT:
            text = f"{dotted} is missing{_misspelled(str(item['loc'][-1]), item['input'])}"
        elif item["type"] in EXTRA:
            text = f"unknown key {dotted}"
        elif item["type"] == "value_error":
            text = f"{dotted}: {problem}"
        else:
            text = f"{dotted} is {item['input']!r}: {problem}"
        lines.setdefault(dotted, f"{recipe.where(where)}: {text}")
    return list(lines.values())


def _misspelled(missing: str, given: Any) -> str:
    """A hint, if one of the given keys looks like the one that is missing."""
    near = nearest(missing, map(str, given)) if isinstance(given, Mapping) else None
    return f"; there is {near!r}" if near is not None else ""


def _keys(loc: Sequence[str | int], recipe: Recipe, path: Sequence[str | int], *, absent: bool) -> list[str | int]:
    """The keys of the recipe in a location of pydantic's, which also names the branches of unions."""
    node: Any = recipe.tree
    for step in path:
        node = node[step] if isinstance(node, list) and isinstance(step, int) else node.get(step, {})
    keys: list[str | int] = []
    for position, step in enumerate(loc):
        inside = step in node if isinstance(node, dict) else isinstance(node, list) and isinstance(step, int)
        if inside:
            node = node[step]
            keys.append(step)
        elif absent and position == len(loc) - 1:
            keys.append(step)
    return keys
