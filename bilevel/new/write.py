"""Write a package with one part of a kind: its name decides all others, which must be free."""

from __future__ import annotations

import ast
import re
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jinja2

from bilevel.errors import InputError
from bilevel.files import write_atomic
from bilevel.new.template import Template
from bilevel.plugins import Plugins

PATTERN = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


def new(kind: str, name: str, plugins: Plugins, *, into: Path | None = None) -> Path:
    """Write the package bilevel-NAME, with one part. Returns its directory, by default of the same name.

    kind: what a plugin has registered a template for: "problem", "solver", "check", ...

    Raises `InputError` for an unknown kind, for a name that is none or is taken, and for a directory that exists.
    """
    template: Template = plugins.find("templates", kind).load()
    if not PATTERN.fullmatch(name):
        raise InputError(
            f"{name!r} is no name for a part; use small letters, digits and hyphens, beginning with a letter: my-{kind}"
        )
    module, cls = f"bilevel_{name.replace('-', '_')}", "".join(word.capitalize() for word in name.split("-"))
    parts = plugins.parts[template.hook.removeprefix("bilevel_")]
    if name in parts:
        raise InputError(
            f"there is a {kind} named {name!r} already, of the plugin {parts[name].plugin!r}; choose another name"
        )
    if find_spec(module) is not None:
        raise InputError(f"a module {module} is installed already; choose another name than {name!r}")
    directory = into or Path(f"bilevel-{name}")
    if directory.exists():
        raise InputError(f"{directory} exists already, and nothing is written over it; remove it, or choose another name")
    written = _rendered(template, kind, name, module, cls)
    for path, text in written.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(directory / path, text)
    return directory


def _rendered(template: Template, kind: str, name: str, module: str, cls: str) -> dict[str, str]:
    """The files of the package, by path."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, trim_blocks=True)
    names: dict[str, Any] = {"kind": kind, "name": name, "module": module, "Class": cls, "template": template}

    def rendered(file: str, *, common: bool = False) -> str:
        folder = files("bilevel.new").joinpath("templates", "package") if common else template.files
        return environment.from_string(folder.joinpath(f"{file}.jinja").read_text(encoding="utf-8")).render(names)

    part = rendered("part.py")
    if cls in _imported(part):
        raise InputError(
            f"a {kind} named {name!r} would have the class {cls}, which hides another of that name; choose another"
        )
    names["recipe"] = recipe = template.files.joinpath("recipe.yaml.jinja").is_file()
    return {
        "pyproject.toml": rendered("pyproject.toml", common=True),
        "README.md": rendered("README.md", common=True),
        **({"recipe.yaml": rendered("recipe.yaml")} if recipe else {}),
        f"{module}/__init__.py": rendered("plugin.py", common=True),
        f"{module}/{kind}.py": part,
        f"{module}/py.typed": "",
        f"tests/test_{module}.py": rendered("test.py"),
    }


def _imported(source: str) -> set[str]:
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    return {alias.asname or alias.name for node in imports for alias in node.names}
