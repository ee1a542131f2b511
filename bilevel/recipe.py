"""A recipe as written: YAML text with `--set` changes, and the line every key came from."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from bilevel.errors import InputError
from bilevel.files import write_atomic
from bilevel.plaintext import unprintable

Path_ = tuple[str | int, ...]

DEEPEST, MOST_VALUES = 50, 50_000
"""Limits of a recipe, its aliases expanded. Real ones have a few hundred values; an alias bomb has billions."""
LONGEST_SHOWN = 120
LARGEST = 2**53
"""Whole numbers beyond are not numbers of anything, and would be rounded where they meet a float."""


class _Loader(yaml.SafeLoader):
    """YAML whose plain values mean what everybody expects: `1e-5` is a number; dates, `1:30` and `010` are not turned into
    something else, as YAML 1.1 asks for (a date, 90 and 8)."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose one node. Raises `ComposerError` before nesting exhausts Python's stack."""
        self.depth += 1
        if self.depth > DEEPEST:
            raise yaml.composer.ComposerError(None, None, f"nested more than {DEEPEST} deep", self.get_mark())
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


_REPLACED = {f"tag:yaml.org,2002:{tag}" for tag in ("float", "int", "timestamp")}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Dumper(yaml.SafeDumper):
    """Puts into quotes what either YAML 1.1 or `_Loader` would take for something other than text."""


for _reader in (_Loader, _Dumper):
    _reader.add_implicit_resolver(
        "tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$", re.A), list("-+0123456789")
    )
    _reader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)?|\.inf|\.Inf|\.nan|\.NaN)$", re.A),
        list("-+0123456789."),
    )


def dump(tree: Mapping[str, Any]) -> str:
    """The YAML text of plain data, which `Recipe.read` reads as the same data."""
    return yaml.dump(dict(tree), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


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
        except UnicodeDecodeError as error:
            raise InputError(f"the recipe {file} cannot be read: it is not UTF-8 text") from error
        except (OSError, ValueError) as error:  # ValueError: a null byte in the path
            raise InputError(f"the recipe {file} cannot be read: {error}") from error
        lines: dict[Path_, str] = {}
        tree = _parse(text, str(file), lines)
        if not isinstance(tree, dict):
            raise InputError(f"{file}: a recipe is a mapping with the keys problem, solver, backend, active and run")
        return cls(tree, lines, str(file))

    def save(self, file: str | Path) -> None:
        """Write it as a YAML file, which `Recipe.read` and `bilevel run` read. Raises `OSError` if that cannot be done."""
        write_atomic(Path(file), dump(self.tree))

    def set(self, assignment: str) -> None:
        """Apply one `--set key.path=value`; the value is read as YAML, and `key.0.path` goes into lists."""
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise InputError(f"--set {assignment}: write key=value, for example solver.penalty=20")
        origin = f"--set {assignment if len(assignment) <= LONGEST_SHOWN else assignment[:LONGEST_SHOWN] + '…'}"
        self.put(key, _parse(text, origin), origin)

    def put(self, key: str, value: Any, origin: str) -> None:
        """Give the key (`key.path`, and `key.0.path` in lists) this value, as it is.

        origin: where the value comes from, such as an option: what `where` answers. Raises `InputError` if there is no such
        place.
        """
        steps: list[str | int] = [int(step) if step.isascii() and step.isdecimal() else step for step in key.split(".")]
        node: Any = self.tree
        for depth, step in enumerate(steps[:-1]):
            node = self._enter(node, step, origin, steps[:depth])
        last = steps[-1]
        if isinstance(node, list):
            if not isinstance(last, int) or last >= len(node):
                raise InputError(f"{origin}: {'.'.join(map(str, steps[:-1]))} is a list of {len(node)}")
            node[last] = value
        elif isinstance(node, dict):
            node[str(last)] = value
        else:
            raise InputError(f"{origin}: {'.'.join(map(str, steps[:-1]))} is {node!r}, which has no keys")
        self._lines = {path: line for path, line in self._lines.items() if path[: len(steps)] != tuple(steps)}
        self._lines[tuple(steps)] = origin

    def where(self, path: Sequence[str | int]) -> str:
        """The file and line, or the option, that gave the value at `path` or else the nearest key around it."""
        for length in range(len(path), 0, -1):
            found = self._lines.get(tuple(path[:length]))
            if found is not None:
                return found
        return self.name

    def check_values(self) -> None:
        """Raise `InputError`, naming file, line and key, for what no setting can be.

        That is: a number that is not finite, or too large; text with control characters, which a terminal would obey; a key
        that is not text.
        """
        self._check(self.tree, ())

    def _check(self, node: Any, path: Path_) -> None:
        dotted = ".".join(map(str, path))
        if isinstance(node, dict):
            for key, value in node.items():
                if not isinstance(key, str):
                    raise InputError(f"{self.where(path)}: the key {key!r} is not text; put it in quotes")
                if unprintable(key):
                    raise InputError(f"{self.where((*path, key))}: the key {key!r} has control characters")
                self._check(value, (*path, key))
        elif isinstance(node, list | tuple):
            for index, value in enumerate(node):
                self._check(value, (*path, index))
        elif isinstance(node, float) and not math.isfinite(node):
            raise InputError(f"{self.where(path)}: {dotted} is {node}; give a finite number")
        elif isinstance(node, int) and not -LARGEST <= node <= LARGEST:
            raise InputError(f"{self.where(path)}: {dotted} is a number of {_digits(node)} digits, which is too large")
        elif isinstance(node, str) and unprintable(node):
            raise InputError(f"{self.where(path)}: {dotted} has control characters: {node!r}")

    @staticmethod
    def _enter(node: Any, step: str | int, origin: str, walked: Sequence[str | int]) -> Any:
        if isinstance(node, list) and isinstance(step, int) and step < len(node):
            return node[step]
        if isinstance(node, dict):
            if node.get(str(step)) is None:
                node[str(step)] = {}
            return node[str(step)]
        raise InputError(f"{origin}: there is nothing at {'.'.join(map(str, [*walked, step]))}")


def _digits(number: int) -> int:
    return math.ceil(abs(number).bit_length() * math.log10(2))


def _parse(text: str, origin: str, lines: dict[Path_, str] | None = None) -> Any:
    """The value of a YAML text. Raises `InputError` if it is none, or none that a recipe can hold.

    origin: the file, or the option, for messages. lines: receives the line of every key; None: it has no lines.
    """
    loader = None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return None
        _Walk(origin, lines).visit(root, (), ())
        return loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark and lines is not None else ""
        raise InputError(f"{origin}{line}: not valid YAML: {error.problem}") from error
    except yaml.reader.ReaderError as error:
        line = f":{text.count(chr(10), 0, error.position) + 1}" if lines is not None else ""
        raise InputError(f"{origin}{line}: not valid YAML: it has control characters") from error
    finally:
        if loader is not None:
            loader.dispose()


class _Walk:
    """Visits every node of a YAML text: records lines, and raises `InputError` for what a recipe cannot hold."""

    def __init__(self, origin: str, lines: dict[Path_, str] | None) -> None:
        self.origin = origin
        self.lines = lines
        self.keys: dict[Path_, str] = {}
        self.left = MOST_VALUES

    def visit(self, node: yaml.Node, path: Path_, above: tuple[int, ...]) -> None:
        line = self._line(node)
        self.left -= 1
        if id(node) in above:
            raise InputError(f"{line}: an alias that contains itself")
        if self.left < 0:
            raise InputError(f"{line}: aliases make this more than {MOST_VALUES:,} values")
        if len(above) >= DEEPEST:
            raise InputError(f"{line}: nested more than {DEEPEST} deep")
        if self.lines is not None:
            self.lines.setdefault(path, line)
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if kind not in _KINDS[type(node)]:
            raise InputError(f"{line}: the tag {node.tag!r} has no meaning in a recipe; write a plain value")
        above = (*above, id(node))
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                self._visit_key(key, path)
                self.visit(value, (*path, key.value), above)
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                self.visit(value, (*path, index), above)
        else:
            self._construct(node, kind, line)

    def _visit_key(self, key: yaml.Node, path: Path_) -> None:
        line = self._line(key)
        if _merges(key):
            return
        if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
            shown = f"the key {key.value!r}" if isinstance(key, yaml.ScalarNode) else "a list or mapping as key"
            raise InputError(f"{line}: {shown} is not text; put it in quotes")
        here = (*path, key.value)
        if here in self.keys:
            raise InputError(f"{line}: the key {'.'.join(map(str, here))} is given twice (before: {self.keys[here]})")
        self.keys[here] = line
        if self.lines is not None:
            self.lines[here] = line

    def _construct(self, node: yaml.Node, kind: str, line: str) -> None:
        """A scalar by itself, so that what cannot be read is found where its line is known."""
        try:
            yaml.constructor.SafeConstructor().construct_document(node)
        except (ValueError, LookupError, yaml.YAMLError) as error:  # too many digits; no boolean; nothing at all
            shown = node.value if len(node.value) <= 40 else f"{node.value[:40]}…"
            raise InputError(f"{line}: {shown!r} cannot be read as {kind}") from error

    def _line(self, node: yaml.Node) -> str:
        return self.origin if self.lines is None else f"{self.origin}:{node.start_mark.line + 1}"


_KINDS: Mapping[type, Sequence[str]] = {
    yaml.MappingNode: ("map",),
    yaml.SequenceNode: ("seq",),
    yaml.ScalarNode: ("str", "int", "float", "bool", "null"),
}
"""Node -> the tags that a recipe may have there."""


def _merges(key: yaml.Node) -> bool:
    return bool(key.tag == "tag:yaml.org,2002:merge")
