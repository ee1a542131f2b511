"""Where rows are: in files on this machine, or in a data set of the hub."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from bilevel.errors import InputError
from bilevel_llm.data.files import find_files, split_of, unknown_ending
from bilevel_llm.data.hub import PREFIX, hub_files, may_be_hub_name


def find_places(patterns: Sequence[str], split: str | None = None, subset: str | None = None) -> list[Path]:
    """The files of all that is named, each once, in the order of `patterns`.

    patterns: paths and globs, and names of data sets of the hub (see `hub_files`). What looks like one of these, but is the
        path of something here, is that.
    split: of data sets of the hub, and of saved ones; None takes the only one. subset: of data sets of the hub.

    Raises `InputError` as `find_files` and `hub_files` do, and for a split or subset of what has none.
    """
    found: dict[Path, Path] = {}
    divided = False
    for pattern in patterns:
        if pattern.startswith(PREFIX):
            files, divided = hub_files(pattern, split, subset), True
        elif _is_only_on_the_hub(pattern):
            files, divided = _either(pattern, split, subset), True
        else:
            files = _here(pattern)
            if split is not None and (parts := [split_of(file, split) for file in files]) != files:
                files, divided = parts, True
        found |= {file.resolve(): file for file in files if file.resolve() not in found}
    if not found:
        raise InputError("no data files are named; give at least one path or glob")
    for key, value in (("split", split), ("subset", subset)):
        if value is not None and not divided:
            raise InputError(f"{key}: {value} has no meaning for {', '.join(patterns)}: plain files have none; leave it out")
    return list(found.values())


def _here(pattern: str) -> list[Path]:
    try:
        return find_files([pattern])
    except InputError as error:
        if may_be_hub_name(pattern) and unknown_ending(pattern):
            raise InputError(
                f"{error}; if the data set {pattern} of the hub is meant, write hf://datasets/{pattern}"
            ) from error
        raise


def _is_only_on_the_hub(pattern: str) -> bool:
    """Whether it looks like the name of a data set, and not even its first part is here."""
    path = Path(os.path.expanduser(pattern))
    return (
        may_be_hub_name(pattern)
        and unknown_ending(pattern)
        and not glob.has_magic(pattern)
        and not path.exists()
        and not path.parent.exists()
    )


def _either(pattern: str, split: str | None, subset: str | None) -> Sequence[Path]:
    try:
        return hub_files(pattern, split, subset)
    except InputError as error:
        here = f"{pattern} is no file or folder here (looked up from {Path.cwd()})"
        raise InputError(f"{here}, and was taken for a data set of the hub: {error}") from error
