"""The working directory of a run, to which the relative paths of its recipe belong, and how it is found again after a move.

working_directory.json, beside the recipe, says where the run was and where it ran. Later, the run may be named from another
folder, or may have been moved, alone or together with its data.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import chdir, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from bilevel.documents import read_json
from bilevel.errors import InputError
from bilevel.plain import flatten
from bilevel.recipe import Recipe

FILE = "working_directory.json"
RECIPE = "recipe.yaml"
METRICS = "metrics.jsonl"
_started_in: ContextVar[Path | None] = ContextVar("started_in", default=None)
_READS_NO_FILES = ("solver", "backend", "active", "run")
_NO_PATHS = ("name", "class", "format", "template")


@dataclass(frozen=True)
class Origin:
    """The content of the file.

    run: the absolute path of the run directory.
    working_directory: that of the directory to which relative paths belonged.
    paths: the relative paths and globs of the recipe that led to something.
    """

    run: str
    working_directory: str
    paths: list[str] = field(default_factory=list)

    __pydantic_config__: ClassVar[Mapping[str, Any]] = {"extra": "ignore"}


@dataclass(frozen=True)
class Place:
    """Where a command works: in the working directory of the run that it was given, or else where it was started.

    recipe: the file of the recipe.
    run: the run directory; None if the command was given a recipe that belongs to no run.
    start: the directory in which the command was started.
    """

    recipe: Path
    run: Path | None
    start: Path

    def path(self, path: Path) -> Path:
        """A path as it was given to the command, which is relative to where that was started."""
        return path if Path.cwd() == self.start else self.start / path


def origin_text(run: Path, recipe: Mapping[str, Any]) -> str:
    """The content of the file for a run that begins now, in the present working directory."""
    here = Path.cwd()
    paths = [path for path in _candidates(recipe) if _leads_somewhere(here, path)]
    return json.dumps(asdict(Origin(os.path.abspath(run), str(here), paths)), indent=1, ensure_ascii=False)


@contextmanager
def entered(given: Path) -> Iterator[Place]:
    """Work in the working directory of a run, if `given` is one: its directory, or the recipe in it.

    Three directories may be it: the one that stands to the run as it did then, where the data are if they were moved along;
    the one of then; and the present one. That in which most of the recipe's relative paths lead somewhere is entered, and
    the present one is kept if there are no such paths. For a run from before this file was written, the present one and all
    directories above the run are tried.

    Raises `InputError`, naming what was looked for and where, for an `InputError` that is raised within while some of the
    paths lead nowhere.
    """
    start = Path.cwd()
    run = _run_of(given)
    if run is None:
        yield Place(given, None, start)
        return
    origin = _origin(run)
    chosen, missing, tried = _search(run, origin)
    where = run if chosen == start else run.absolute()
    try:
        with chdir(chosen):
            token = _started_in.set(start)
            try:
                yield Place(where / RECIPE, where, start)
            finally:
                _started_in.reset(token)
    except InputError as error:
        if origin is None or not missing:
            raise
        others = [str(directory) for directory in tried if directory != chosen]
        elsewhere = f", and not all of them are in {' or '.join(others)} either" if others else ""
        raise InputError(
            f"{error}\nthe relative paths in {where / RECIPE} are looked up in {chosen}, where "
            f"{', '.join(map(repr, missing))} {'leads' if len(missing) == 1 else 'lead'} nowhere{elsewhere}; "
            f"bring the data back, or move them along with the run (it ran in {origin.working_directory})"
        ) from error


def started_in() -> Path:
    """Where the user is: the present working directory, or, within `entered`, that from which it was entered."""
    return _started_in.get() or Path.cwd()


def directory_of(run: Path) -> Path:
    """The directory that `entered` would enter for a run. Raises `DamagedError` if what was kept of it cannot be read."""
    return _search(run, _origin(run))[0]


def leads_somewhere(path: str) -> bool:
    """Whether this is a relative path or glob under which there is something in the present working directory."""
    return not os.path.isabs(path) and not path.startswith("~") and _leads_somewhere(Path.cwd(), path)


def _origin(run: Path) -> Origin | None:
    return read_json(run / FILE, Origin) if (run / FILE).is_file() else None


def _search(run: Path, origin: Origin | None) -> tuple[Path, list[str], list[Path]]:
    """The directory to which the paths of a run are relative, those of them that lead nowhere there, and what was tried."""
    start = Path.cwd()
    tried = list(dict.fromkeys(_directories(run, origin, start)))
    paths = origin.paths if origin is not None else _candidates(_tree(run))
    found = {directory: [path for path in paths if _leads_somewhere(directory, path)] for directory in tried}
    chosen = max(tried, key=lambda directory: len(found[directory]))  # of equal ones the first
    if not found[chosen]:
        chosen = start
    return chosen, [path for path in paths if path not in found.get(chosen, [])], tried


def _run_of(given: Path) -> Path | None:
    """The run directory that was named, by itself or by its recipe."""
    if given.is_dir() and (given / RECIPE).is_file():
        return given
    inside = given.name == RECIPE and given.is_file()
    return given.parent if inside and any((given.parent / name).is_file() for name in (FILE, METRICS)) else None


def _directories(run: Path, origin: Origin | None, start: Path) -> Iterator[Path]:
    """Where the relative paths may belong, the likeliest first."""
    now = os.path.abspath(run)
    if origin is not None:
        yield Path(os.path.normpath(os.path.join(now, os.path.relpath(origin.working_directory, origin.run))))
        yield Path(origin.working_directory)
        yield start
    else:
        yield start
        yield from Path(now).parents


def _tree(run: Path) -> Mapping[str, Any]:
    with suppress(InputError):  # whoever reads the recipe says what is wrong with it
        return Recipe.read(run / RECIPE).tree
    return {}


def _candidates(recipe: Mapping[str, Any]) -> list[str]:
    """The texts in a recipe that may be relative paths."""
    texts = {
        value: None
        for key, value in flatten({k: v for k, v in recipe.items() if k not in _READS_NO_FILES}).items()
        if isinstance(value, str) and key.rpartition(".")[2] not in _NO_PATHS
    }
    return [text for text in texts if text and not text.startswith("~") and not os.path.isabs(text)]


def _leads_somewhere(directory: Path, path: str) -> bool:
    """Whether there is something of that name, or that matches the glob."""
    with suppress(OSError, ValueError):  # a name that is too long, or has a null byte
        if (directory / path).exists():
            return True
        return glob.has_magic(path) and next(glob.iglob(path, root_dir=directory, recursive=True), None) is not None
    return False
