"""What a user names on the command line -> the sources and validation sets of a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bilevel.errors import InputError
from bilevel_llm.data.files import file_type, find_files

Paths = list[str]


def named_sources(given: Sequence[str], targets: Sequence[str] = ()) -> dict[str, Paths]:
    """Source -> its paths and globs.

    given: each is NAME=PATH, where PATH is a file, a glob or a folder; or a file, which is called by its own name; or a
        folder, of which every data file and every folder with data files is a source.
    targets: files of the validation data. A folder may hold them too; they are no sources.

    Raises `InputError` for a name that is given twice, where there are no data, and for a target that is named as a source.
    """
    aims = {file.resolve() for file in find_files(targets)} if targets else set()
    found: dict[str, Paths] = {}

    def add(name: str, paths: Paths) -> None:
        if not name:
            raise InputError("--source: the name before the = is empty; write NAME=PATH")
        if name in found:
            raise InputError(f"--source {paths[0]}: there is a source {name!r} already; write NAME=PATH with another name")
        found[name] = paths

    for one in given:
        name, equals, path = one.partition("=")
        if equals and not Path(one).exists():
            add(name, _files_of(path))
        elif _is_folder(one):
            others = sorted(path for path in Path(one).iterdir() if path.resolve() not in aims)
            parts = {name: paths for name, paths in map(_part, others) if paths}
            if not parts:
                raise InputError(f"--source {one}: there are no data files in this folder, nor in the folders in it")
            for name, paths in parts.items():
                add(name, paths)
        else:
            add(_stem(Path(one)), _files_of(one))
    for name, paths in found.items():
        if both := [str(file) for file in find_files(paths) if file.resolve() in aims]:
            raise InputError(
                f"{both[0]} is in the source {name!r} and is a --target too: weights would be learned for rows that are "
                "trained on; take other rows for the one or the other"
            )
    return found


def _part(path: Path) -> tuple[str, Paths]:
    """A file or folder of a folder, as a source; without paths if it holds no data."""
    if _is_folder(str(path)):
        return path.name, _globs(path)
    return _stem(path), [str(path)] if _is_data(path) else []


def _files_of(path: str) -> Paths:
    """The paths of one source. Raises `InputError` if they lead to nothing."""
    paths = (_globs(Path(path)) or [path]) if _is_folder(path) else [path]
    for file in find_files(paths):
        file_type(file)
    return paths


def _globs(folder: Path) -> Paths:
    """A glob for every type of data file in a folder."""
    return sorted({f"{folder}/*{file_type(file)}" for file in folder.iterdir() if _is_data(file)})


def _is_folder(path: str) -> bool:
    return Path(path).is_dir() and not _is_data(Path(path))


def _is_data(path: Path) -> bool:
    try:
        return not path.name.startswith(".") and bool(file_type(path))
    except InputError:
        return False


def _stem(path: Path) -> str:
    """The name of a file without its endings, and without the pattern of a glob."""
    name = path.name.partition(".")[0].strip("*?[]")
    return name or path.parent.name
