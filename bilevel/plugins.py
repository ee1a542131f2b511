"""Find plugins, let them register their parts, and load a part by name."""

from __future__ import annotations

import difflib
import importlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from bilevel import hookspecs
from bilevel.errors import InputError

KINDS = ("problems", "solvers", "backends", "weightings", "features", "checks", "commands")
BLOCK_VARIABLE = "BILEVEL_BLOCK_PLUGINS"


@dataclass(frozen=True)
class Part:
    """A registered part: its name in a recipe, where its class is, and which plugin brought it."""

    name: str
    target: str
    plugin: str

    def load(self) -> Any:
        """Import the class. Raises `InputError` with the reason if that fails."""
        module, _, attribute = self.target.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except Exception as error:
            missing = error.name if isinstance(error, ModuleNotFoundError) else None
            hint = f"; install {missing!r} or the extra that brings it" if missing else ""
            raise InputError(
                f"{self.name!r} (plugin {self.plugin!r}) cannot be loaded from {self.target}: "
                f"{type(error).__name__}: {error}{hint}"
            ) from error


@dataclass
class Plugins:
    """Everything that is registered.

    parts: kind (one of KINDS) -> name -> part.
    broken: plugin -> why it could not be used.
    hooks: calls the hooks of all working plugins.
    """

    manager: pluggy.PluginManager
    parts: dict[str, dict[str, Part]] = field(default_factory=lambda: {kind: {} for kind in KINDS})
    broken: dict[str, str] = field(default_factory=dict)

    @property
    def hooks(self) -> Any:
        """The hooks of all working plugins."""
        return self.manager.hook

    def find(self, kind: str, name: str) -> Part:
        """The part of that name. Raises `InputError` naming the nearest known one."""
        known = self.parts[kind]
        if name in known:
            return known[name]
        near = difflib.get_close_matches(name, known, n=1)
        guess = f"; did you mean {near[0]!r}?" if near else ""
        broken = f" (broken plugins: {', '.join(self.broken)}; see `bilevel list`)" if self.broken else ""
        raise InputError(f"no {kind[:-1]} is named {name!r}{guess} Known: {', '.join(sorted(known))}{broken}")


def load_plugins(found: Iterable[EntryPoint] | None = None) -> Plugins:
    """Load the plugins of the entry-point group `bilevel`.

    found: use these entry points instead of the installed ones.

    A plugin that cannot be imported, or implements a hook that does not exist, is listed as broken and stops nothing
    else. Two plugins that register the same name are an `InputError`: which one a recipe means would be a matter of
    luck. Plugins named in the environment variable BILEVEL_BLOCK_PLUGINS (comma-separated) are left out.
    """
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    plugins = Plugins(manager)
    blocked = {name.strip() for name in os.environ.get(BLOCK_VARIABLE, "").split(",")}
    points = entry_points(group=hookspecs.PROJECT) if found is None else found
    for point in sorted({p.name: p for p in points}.values(), key=lambda p: p.name):
        if point.name in blocked:
            continue
        try:
            module = point.load()
            manager.register(module, name=point.name)
            manager.check_pending()
            registered = _registered_by(manager, module, point.name)
        except Exception as error:
            if manager.has_plugin(point.name):
                manager.unregister(name=point.name)
            plugins.broken[point.name] = f"{type(error).__name__}: {error}"
            continue
        for kind, part in registered:
            other = plugins.parts[kind].setdefault(part.name, part)
            if other is not part:
                raise InputError(
                    f"two plugins register the {kind[:-1]} {part.name!r}: {other.plugin!r} ({other.target}) and "
                    f"{part.plugin!r} ({part.target}); uninstall one, or leave it out by {BLOCK_VARIABLE}={part.plugin}"
                )
    return plugins


def _registered_by(manager: pluggy.PluginManager, module: Any, plugin: str) -> list[tuple[str, Part]]:
    """What one plugin registers."""
    registered: list[tuple[str, Part]] = []

    def register_as(kind: str) -> Callable[[str, str], None]:
        def register(name: str, target: str) -> None:
            if ":" not in target:
                raise ValueError(f"{name!r} is registered as {target!r}; write package.module:Class")
            registered.append((kind, Part(name, target, plugin)))

        return register

    others = [other for other in manager.get_plugins() if other is not module]
    for kind in KINDS:
        manager.subset_hook_caller(f"bilevel_{kind}", others)(register=register_as(kind))
    return registered
