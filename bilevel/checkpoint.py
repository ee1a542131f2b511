"""The format of a checkpoint, and how to read it: each tensor is whole and named, whichever backend wrote it.

    variables.json     {variable: {"active": blocks, "steps": n, "marked": bool, "files": {file: [tensor names]}}}
    z-00001-of-00008.safetensors ...
    run.json           what else a run has to know; see `bilevel.keeper`
    manifest.json      {"files": {file: {"bytes": n, "sha256": ...}}} of all the others; it is written last

A tensor is named "weights/<parameter or buffer>", "marked/<parameter>" (what a rewind brings back), "master/<parameter>" or
"optimizer/<parameter>/<key>". A parameter that a module uses in two places is saved once, under the first of its names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import safetensors
from torch import Tensor

from bilevel.documents import read_json
from bilevel.errors import DamagedError, InputError
from bilevel.files import write_atomic, write_through

INDEX = "variables.json"
MANIFEST = "manifest.json"
RUN = "run.json"
WEIGHTS = "weights/"


@dataclass(frozen=True)
class Seal:
    """What a file was when it was written: its size in bytes, and its hash."""

    bytes: int
    sha256: str

    __pydantic_config__: ClassVar[Mapping[str, Any]] = {"extra": "forbid"}


@dataclass(frozen=True)
class Manifest:
    """The files of a checkpoint, by name."""

    files: Mapping[str, Seal]

    __pydantic_config__: ClassVar[Mapping[str, Any]] = {"extra": "forbid"}


def seal(directory: Path, names: Iterable[str]) -> dict[str, Seal]:
    """Bring files that this process has just written to the disk, and hash them.

    They are read from the cache of the operating system, which still holds them: the disk is not read.
    """
    seals = {}
    for name in names:
        write_through(directory / name)
        seals[name] = Seal((directory / name).stat().st_size, _sha256(directory / name))
    return seals


def write_manifest(directory: Path, seals: Mapping[str, Seal]) -> None:
    """Complete a checkpoint, of which `seals` are all files."""
    write_atomic(directory / MANIFEST, json.dumps(asdict(Manifest(seals)), indent=1))


def damage(directory: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with a checkpoint, naming the file; None if every byte is as it was written.

    part, parts: look at this share of its files only, where several processes share the work.
    """
    try:
        manifest = read_json(directory / MANIFEST, Manifest)
        if not manifest.files.keys() >= {INDEX, RUN}:
            return f"{directory / MANIFEST} does not list {INDEX} and {RUN}"
        for name, known in sorted(manifest.files.items())[part::parts]:
            file = directory / name
            size = file.stat().st_size
            if size != known.bytes:
                return f"{file} has {size:,} bytes, and was written with {known.bytes:,}"
            if _sha256(file) != known.sha256:
                return f"{file} is not as it was written: its hash differs"
    except DamagedError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    return None


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@dataclass(frozen=True)
class VariableFacts:
    """What is known of a variable beside its tensors: active blocks, counters, and which tensors are in which file."""

    active: list[str]
    steps: int
    marked: bool
    files: dict[str, list[str]]

    __pydantic_config__: ClassVar[Mapping[str, Any]] = {"extra": "forbid"}


class SavedVariable:
    """One variable in a checkpoint.

    facts: its active blocks and counters.
    where: tensor name -> file.

    Files are memory-mapped: a tensor is read when it is asked for. Raises `DamagedError`, naming the file, if one is missing
    or damaged, and `InputError` if there is no such variable.
    """

    def __init__(self, directory: Path, variable: str) -> None:
        self.directory = directory
        self.variable = variable
        known = _index(directory)
        if variable not in known:
            raise InputError(f"the checkpoint {directory} has no variable {variable!r}, only {', '.join(known)}")
        self.facts = known[variable]
        self.where = {key: file for file, keys in self.facts.files.items() for key in keys}
        map_file: Callable[[Path, str], Any] = safetensors.safe_open
        self._open: dict[str, Any] = {}
        for file, keys in self.facts.files.items():
            try:
                self._open[file] = map_file(directory / file, "pt")
                missing = set(keys) - set(self._open[file].keys())
            except Exception as error:  # missing, cut short, or not safetensors
                raise DamagedError(
                    f"the checkpoint {directory} is incomplete: its file {file} cannot be read ({error}); "
                    "all processes must write to one file system"
                ) from error
            if missing:
                raise DamagedError(f"the checkpoint {directory} is damaged: its file {file} lacks {min(missing)}")

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
    """The variables in a checkpoint. Raises `DamagedError` if it cannot be read."""
    return list(_index(directory))


def _index(directory: Path) -> dict[str, VariableFacts]:
    try:
        return read_json(directory / INDEX, dict[str, VariableFacts])
    except DamagedError as error:
        raise DamagedError(f"the checkpoint {directory} cannot be read: {error}") from error
