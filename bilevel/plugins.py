"""Find plugins, let them register their parts, and load parts by name."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from bilevel import hookspecs
from bilevel.errors import InputError
from bilevel.suggest import did_you_mean, nearest

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

    parts: kind -> name -> part. A kind is the plural in the name of a hook: "solvers" for `bilevel_solvers`.
    broken: plugin -> why it could not be used.
    hooks: calls the hooks of all working plugins.
    """

    manager: pluggy.PluginManager
    parts: dict[str, dict[str, Part]] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)

    @property
    def hooks(self) -> Any:
        """The hooks of all working plugins."""
        return self.manager.hook

    def find(self, kind: str, name: str) -> Part:
        """The part of that name. Raises `InputError` with the nearest known name, or all of them."""
        known = self.parts.get(kind, {})
        if name in known:
            return known[name]
        broken = f" (broken plugins: {', '.join(self.broken)}; see `bilevel list`)" if self.broken else ""
        raise InputError(f"no {kind[:-1]} is named {name!r}{did_you_mean(name, sorted(known))}{broken}")


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
        if point.name not in blocked:
            with _broken_if_it_fails(plugins, point.name):
                module = point.load()
                manager.register(module, name=point.name)
                for name in _only(manager, module).bilevel_kinds():
                    manager.add_hookspecs(importlib.import_module(name))
    # Only now are all kinds known, whichever plugin brought them.
    kinds = _kinds(manager)
    plugins.parts.update({kind: {} for kind in kinds})
    for name, module in list(manager.list_name_plugin()):
        registered: list[tuple[str, Part]] = []
        with _broken_if_it_fails(plugins, name):
            _require_known_hooks(manager, module)
            registered = _registered_by(manager, module, name, kinds)
        for kind, part in registered:
            other = plugins.parts[kind].setdefault(part.name, part)
            if other is not part:
                raise InputError(
                    f"two plugins register the {kind[:-1]} {part.name!r}: {other.plugin!r} ({other.target}) and "
                    f"{part.plugin!r} ({part.target}); uninstall one, or leave it out by {BLOCK_VARIABLE}={part.plugin}"
                )
    return plugins


@contextmanager
def _broken_if_it_fails(plugins: Plugins, name: str) -> Iterator[None]:
    """Whatever one plugin raises is kept as the reason why it is left out."""
    try:
        yield
    except Exception as error:
        if plugins.manager.has_plugin(name):
            plugins.manager.unregister(name=name)
        plugins.broken[name] = f"{type(error).__name__}: {error}"


def _only(manager: pluggy.PluginManager, module: Any) -> pluggy.HookRelay:
    """The hooks of one plugin."""
    others = [other for other in manager.get_plugins() if other is not module]
    relay = pluggy.HookRelay()
    for name in vars(manager.hook):
        setattr(relay, name, manager.subset_hook_caller(name, others))
    return relay


def _kinds(manager: pluggy.PluginManager) -> list[str]:
    """The kinds of parts: those of the core first, in the order of their hooks."""
    specified = [hook for hook in vars(manager.hook).values() if hook.spec is not None]
    return [hook.name.removeprefix("bilevel_") for hook in specified if "register" in hook.spec.argnames]


def _require_known_hooks(manager: pluggy.PluginManager, module: Any) -> None:
    """Raise `ValueError` for a hook that neither the core nor any plugin specifies: it would never be called."""
    for hook in manager.get_hookcallers(module) or []:
        if hook.spec is None:
            known = [hook.name for hook in vars(manager.hook).values() if hook.spec is not None]
            near = nearest(hook.name, known)
            raise ValueError(f"unknown hook {hook.name!r}" + (f"; did you mean {near!r}?" if near else ""))


def _registered_by(manager: pluggy.PluginManager, module: Any, plugin: str, kinds: Iterable[str]) -> list[tuple[str, Part]]:
    """What one plugin registers."""
    registered: list[tuple[str, Part]] = []

    def register_as(kind: str) -> Callable[[str, str], None]:
        def register(name: str, target: str) -> None:
            if ":" not in target:
                raise ValueError(f"{name!r} is registered as {target!r}; write package.module:Class")
            registered.append((kind, Part(name, target, plugin)))

        return register

    hooks = _only(manager, module)
    for kind in kinds:
        getattr(hooks, f"bilevel_{kind}")(register=register_as(kind))
    return registered
