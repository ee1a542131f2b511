"""The format of a checkpoint, and how to read it: each tensor by its name, whichever backend wrote it, in pieces.

    variables.json     {variable: {"active": blocks, "steps": n, "marked": bool, "files": [those with its tensors]}}
    z-00001-of-00008.safetensors ...  what each process held; see `bilevel.pieces`
    run.json           what else a run has to know; see `bilevel.keeper`
    manifest.json      {"format": n, "files": {file: {"bytes": n, "sha256": ...}}} of all the others; it is written last

A tensor is named "weights/<parameter or buffer>", "marked/<parameter>" (what a rewind brings back), "master/<parameter>" or
"optimizer/<parameter>/<key>". A parameter that a module uses in two places is saved once, under the first of its names. A
parameter that never trains is not saved: variables.json has its checksum instead, under "fixed".
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from bilevel.documents import read_json
from bilevel.errors import DamagedError, InputError
from bilevel.files import write_atomic
from bilevel.pieces import PieceFile
from bilevel.sealed import Seal, broken

FORMAT = 3
"""Counted up when the format changes. That of 1, which had no number, was of whole tensors; 2 also held the parameters that
never train, and can still be read."""
READABLE = (2, FORMAT)

INDEX = "variables.json"
MANIFEST = "manifest.json"
RUN = "run.json"
WEIGHTS = "weights/"


@dataclass(frozen=True)
class Manifest:
    """The files of a checkpoint, by name, and the number of the format that they are in."""

    files: Mapping[str, Seal]
    format: int = 1

    __pydantic_config__: ClassVar[Mapping[str, Any]] = {"extra": "forbid"}


def write_manifest(directory: Path, seals: Mapping[str, Seal]) -> None:
    """Complete a checkpoint, of which `seals` are all files."""
    write_atomic(directory / MANIFEST, json.dumps(asdict(Manifest(seals, FORMAT)), indent=1))


def damage(directory: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with a checkpoint, naming the file; None if every byte is as it was written.

    part, parts: look at this share of its files only, where several processes share the work. Of a checkpoint of as many
        processes, it is what process `part` wrote, and what it will load: a machine reads each file from its disk once.
    """
    try:
        manifest = read_json(directory / MANIFEST, Manifest)
        if manifest.format not in READABLE:
            return (
                f"{directory} was written by another version of bilevel (its format of checkpoints is {manifest.format}, "
                f"and this version reads {FORMAT})"
            )
        if not manifest.files.keys() >= {INDEX, RUN}:
            return f"{directory / MANIFEST} does not list {INDEX} and {RUN}"
        files = sorted(manifest.files.items(), key=lambda item: (item[0].endswith(".json"), item[0]))
        return next(filter(None, (broken(directory / name, seal) for name, seal in files[part::parts])), None)
    except DamagedError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"


@dataclass(frozen=True)
class FixedFacts:
    """What is known of a parameter that never trains: its precision as torch calls it, its shape, and a checksum."""

    dtype: str
    shape: list[int]
    checksum: str

    __pydantic_config__: ClassVar[Mapping[str, Any]] = {"extra": "forbid"}


@dataclass(frozen=True)
class VariableFacts:
    """What is known of a variable beside its tensors: active blocks, counters, the files that hold its tensors, and the
    parameters that no file holds, as they never train."""

    active: list[str]
    steps: int
    marked: bool
    files: list[str]
    fixed: dict[str, FixedFacts] = field(default_factory=dict)

    __pydantic_config__: ClassVar[Mapping[str, Any]] = {"extra": "forbid"}


class SavedVariable:
    """One variable in a checkpoint.

    facts: its active blocks and counters.
    shapes: tensor name -> the shape of the whole tensor.

    Files are memory-mapped: what is asked for is read, and no more. Raises `DamagedError`, naming the file or the tensor, if
    something is missing or damaged, and `InputError` if there is no such variable.
    """

    def __init__(self, directory: Path, variable: str) -> None:
        self.directory = directory
        self.variable = variable
        known = _index(directory)
        if variable not in known:
            raise InputError(f"the checkpoint {directory} has no variable {variable!r}, only {', '.join(known)}")
        self.facts = known[variable]
        try:
            files = [PieceFile(directory / file) for file in self.facts.files]
        except DamagedError as error:
            raise DamagedError(
                f"the checkpoint {directory} is incomplete: {error}; all processes must write to one file system"
            ) from error
        self.shapes = {name: shape for file in files for name, shape in file.shapes.items()}
        self._pieces: dict[str, list[PieceFile]] = {name: [] for name in self.shapes}
        for file in files:
            for name, here in file.stretches.items():
                if here or not math.prod(self.shapes[name]):
                    self._pieces[name].append(file)
        for name, pieces in self._pieces.items():
            pieces.sort(key=lambda file, name=name: file.stretches[name].start)  # type: ignore[misc]
            self._require_whole(name)

    def read(self, name: str, places: range | None = None) -> Tensor:
        """A tensor by its name.

        places: read these alone of the flattened tensor, which has then the shape (n,). None: all, in the tensor's shape.
        """
        wanted = range(math.prod(self.shapes[name])) if places is None else places
        holders = [file for file in self._pieces[name] if _overlap(file.stretches[name], wanted)] or self._pieces[name][:1]
        parts, done = [], wanted.start
        for file in holders:  # what two of them hold is read once
            parts.append(file.read(name, range(done, wanted.stop)))
            done = max(done, file.stretches[name].stop)
        values = parts[0] if len(parts) == 1 else torch.cat(parts)
        return values.view(self.shapes[name]) if places is None else values

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter that is saved, and persistent buffer, by its name in the module, one after the other."""
        return ((name.removeprefix(WEIGHTS), self.read(name)) for name in self.shapes if name.startswith(WEIGHTS))

    def _require_whole(self, name: str) -> None:
        """Raise `DamagedError` unless the pieces of a tensor are all of it."""
        known = 0
        for here in (file.stretches[name] for file in self._pieces[name]):
            known = max(known, here.stop) if here.start <= known else known
        if known != math.prod(self.shapes[name]):
            raise DamagedError(
                f"the checkpoint {self.directory} is damaged: of {self.variable}/{name}, which has the shape "
                f"{self.shapes[name]}, the numbers from {known} on are missing"
            )


def _overlap(one: range, other: range) -> bool:
    return max(one.start, other.start) < min(one.stop, other.stop)


def saved_variables(directory: Path) -> list[str]:
    """The variables in a checkpoint. Raises `DamagedError` if it cannot be read."""
    return list(_index(directory))


def _index(directory: Path) -> dict[str, VariableFacts]:
    try:
        return read_json(directory / INDEX, dict[str, VariableFacts])
    except DamagedError as error:
        raise DamagedError(f"the checkpoint {directory} cannot be read: {error}") from error
