"""A recipe as written: YAML text with `--set` changes, and the line every key came from."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from bilevel.errors import InputError

Path_ = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """YAML in which `1e-5` is a number, as everybody expects (YAML 1.1 asks for a dot and a sign)."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)?|\.inf|\.Inf|\.nan|\.NaN)$"),
    list("-+0123456789."),
)


class Recipe:
    """A recipe as a tree, with the file and line of every key.

    tree: the content of the file, changed by the `--set` options.
    """

    def __init__(self, tree: dict[str, Any], lines: Mapping[Path_, str], name: str) -> None:
        self.tree = tree
        self.name = name
        self._lines = dict(lines)

    @classmethod
    def read(cls, file: Path) -> Recipe:
        """Read a YAML recipe. Raises `InputError`, naming file and line, if it is not one."""
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"the recipe {file} cannot be read: {error}") from error
        try:
            root = yaml.compose(text, Loader=_Loader)
            lines: dict[Path_, str] = {}
            if root is not None:
                _locate(root, (), str(file), lines)
            tree = yaml.load(text, Loader=_Loader)
        except yaml.MarkedYAMLError as error:
            line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
            raise InputError(f"{file}{line}: not valid YAML: {error.problem}") from error
        if not isinstance(tree, dict):
            raise InputError(f"{file}: a recipe is a mapping with the keys problem, solver, backend, active and run")
        return cls(tree, lines, str(file))

    def set(self, assignment: str) -> None:
        """Apply one `--set key.path=value`; the value is read as YAML, and `key.0.path` goes into lists."""
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise InputError(f"--set {assignment}: write key=value, for example solver.penalty=20")
        try:
            value = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError as error:
            raise InputError(f"--set {assignment}: {text!r} is not valid YAML") from error
        steps: list[str | int] = [int(step) if step.isdigit() else step for step in key.split(".")]
        node: Any = self.tree
        for depth, step in enumerate(steps[:-1]):
            node = self._enter(node, step, assignment, steps[:depth])
        last = steps[-1]
        if isinstance(node, list):
            if not isinstance(last, int) or last >= len(node):
                raise InputError(f"--set {assignment}: {'.'.join(map(str, steps[:-1]))} is a list of {len(node)}")
            node[last] = value
        elif isinstance(node, dict):
            node[str(last)] = value
        else:
            raise InputError(f"--set {assignment}: {'.'.join(map(str, steps[:-1]))} is {node!r}, which has no keys")
        self._lines[tuple(steps)] = f"--set {assignment}"

    def where(self, path: Sequence[str | int]) -> str:
        """The file and line, or the option, that gave the value at `path` or else the nearest key around it."""
        for length in range(len(path), 0, -1):
            found = self._lines.get(tuple(path[:length]))
            if found is not None:
                return found
        return self.name

    @staticmethod
    def _enter(node: Any, step: str | int, assignment: str, walked: Sequence[str | int]) -> Any:
        if isinstance(node, list) and isinstance(step, int) and step < len(node):
            return node[step]
        if isinstance(node, dict):
            if node.get(str(step)) is None:
                node[str(step)] = {}
            return node[str(step)]
        raise InputError(f"--set {assignment}: there is nothing at {'.'.join(map(str, [*walked, step]))}")


def _locate(node: yaml.Node, path: Path_, file: str, lines: dict[Path_, str]) -> None:
    """Record the line of every key. Raises `InputError` for a key given twice, as one of the two would be ignored."""
    lines.setdefault(path, f"{file}:{node.start_mark.line + 1}")
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, key.value)
            line = f"{file}:{key.start_mark.line + 1}"
            if here in lines:
                raise InputError(f"{line}: the key {'.'.join(map(str, here))} is given twice (before: {lines[here]})")
            lines[here] = line
            _locate(value, here, file, lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _locate(value, (*path, index), file, lines)
