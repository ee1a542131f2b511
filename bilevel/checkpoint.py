"""The format of a backend's checkpoint, and how to read it: each tensor is whole and named, whichever backend wrote it.

    variables.json     {variable: {"active": blocks, "steps": n, "marked": bool, "files": {file: [tensor names]}}}
    z-00001-of-00008.safetensors ...

A tensor is named "weights/<parameter or buffer>", "marked/<parameter>" (what a rewind brings back), "master/<parameter>" or
"optimizer/<parameter>/<key>". A parameter that a module uses in two places is saved once, under the first of its names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from bilevel.errors import InputError

INDEX = "variables.json"
WEIGHTS = "weights/"


class SavedVariable:
    """One variable in a checkpoint.

    facts: its active blocks and counters.
    where: tensor name -> file.

    Files are memory-mapped: a tensor is read when it is asked for. Raises `InputError`, naming the file, if one is missing
    or damaged, or if there is no such variable.
    """

    def __init__(self, directory: Path, variable: str) -> None:
        self.directory = directory
        self.variable = variable
        known = _index(directory)
        if variable not in known:
            raise InputError(f"the checkpoint {directory} has no variable {variable!r}, only {', '.join(known)}")
        self.facts: dict[str, Any] = known[variable]
        self.where = {key: file for file, keys in self.facts["files"].items() for key in keys}
        map_file: Callable[[Path, str], Any] = safetensors.safe_open
        self._open: dict[str, Any] = {}
        for file in self.facts["files"]:
            try:
                self._open[file] = map_file(directory / file, "pt")
            except Exception as error:  # missing, cut short, or not safetensors
                raise InputError(
                    f"the checkpoint {directory} is incomplete: its file {file} cannot be read ({error}); "
                    "all processes must write to one file system"
                ) from error

    def read(self, key: str) -> Tensor:
        """A whole tensor, by its name."""
        tensor: Tensor = self._open[self.where[key]].get_tensor(key)
        return tensor

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return tuple(self._open[self.where[key]].get_slice(key).get_shape())

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter and persistent buffer by its name in the module, one after the other."""
        return ((key.removeprefix(WEIGHTS), self.read(key)) for key in self.where if key.startswith(WEIGHTS))


def saved_variables(directory: Path) -> list[str]:
    """The variables in a checkpoint. Raises `InputError` if it cannot be read."""
    return list(_index(directory))


def _index(directory: Path) -> dict[str, Any]:
    try:
        found = json.loads((directory / INDEX).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"the checkpoint {directory} cannot be read: {error}") from error
    return found if isinstance(found, dict) else {}
