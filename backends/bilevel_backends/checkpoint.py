"""Save and load variables in the format of `bilevel.checkpoint`, however they are sharded.

Each process writes what it holds, and reads what it will hold: nothing is gathered, and no process ever holds a whole model.
Of what several processes hold alike, each writes an equal part. A run can be resumed with another number of processes or
another backend, since the files say which stretch of which tensor is where.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from bilevel.checkpoint import INDEX, WEIGHTS, SavedVariable, VariableFacts
from bilevel.errors import InputError
from bilevel.pieces import Piece, write_pieces
from bilevel.sealed import Seal, write_sealed
from bilevel_backends.processes import Processes
from bilevel_backends.sharding.flat import flat_stretch, pad_to
from bilevel_backends.staging import Staging
from bilevel_backends.variable import STEPS, ModuleVariable

MARKED = "marked/"


def save(
    directory: Path, variables: Sequence[ModuleVariable], processes: Processes, staging: Staging | None
) -> Callable[[], Mapping[str, Seal]]:
    """Prepare to write the variables into a directory that every process reaches.

    Communicates only the first time, about checksums of what never trains.

    staging: copy what is to be written, so that the variables may change before it is written; None: they stay as they are.

    Returns what writes this process's files and tells their seals. It raises `OSError`, naming the file, if one cannot be
    written.
    """
    pieces = {v.name: list(_pieces(v, processes)) for v in variables}
    if staging is not None:
        copies = iter(staging.copy([piece.values for all_of_it in pieces.values() for piece in all_of_it]))
        pieces = {name: [replace(piece, values=next(copies)) for piece in all_of_it] for name, all_of_it in pieces.items()}
    facts = {
        v.name: asdict(
            VariableFacts(
                sorted(v.active), v.steps, v.marked is not None, _files(v.name, processes), v.fixed.facts(v.sharding)
            )
        )
        for v in variables
    }

    def write() -> Mapping[str, Seal]:
        seals = {}
        for name, content in pieces.items():
            file = _files(name, processes)[processes.rank]
            seals[file] = write_pieces(directory / file, content)
        if processes.rank == 0:
            seals[INDEX] = write_sealed(directory / INDEX, [json.dumps(facts, indent=1).encode()])
        return seals

    return write


def load(directory: Path, variables: Sequence[ModuleVariable]) -> None:
    """Read what `save` wrote into variables of the same model. Communicates only as sharding requires.

    Raises `InputError`, naming the file, if it is incomplete or belongs to a different model or precision; the variables are
    then as they were, except for their active blocks.
    """
    saved = {v.name: SavedVariable(directory, v.name) for v in variables}
    for v in variables:
        v.activate(frozenset(saved[v.name].facts.active))
        _check(saved[v.name], v)
    for v in variables:
        with torch.no_grad():
            _restore(saved[v.name], v)
        v.drop_gradients()
        v.steps = saved[v.name].facts.steps


def load_weights(directory: Path, variables: Sequence[ModuleVariable]) -> None:
    """Read the weights alone, as `load` does."""
    saved = {v.name: SavedVariable(directory, v.name) for v in variables}
    for v in variables:
        _check(saved[v.name], v)
    for v in variables:
        with torch.no_grad():
            _restore_weights(saved[v.name], v)


def _shard(saved: SavedVariable, v: ModuleVariable, key: str, name: str) -> Tensor:
    """This process's shard of a tensor that is sharded like the named parameter."""
    local = v.sharding.local(name)
    return pad_to(saved.read(key, v.sharding.stretch(name)), local.numel()).view(local.shape)


def _restore_weights(saved: SavedVariable, v: ModuleVariable) -> None:
    for name in v.sharding.parameters:
        if name not in saved.facts.fixed:
            v.sharding.local(name).copy_(_shard(saved, v, WEIGHTS + name, name))
            v.sharding.all_gather([name])
    for name, buffer in _buffers(v):
        buffer.copy_(saved.read(WEIGHTS + name))
    for name, master in v.masters.items():
        if v.has_master(name):  # of what was written in full precision, the parameter is the master
            key = f"master/{name}"
            master.copy_(_shard(saved, v, key, name) if key in saved.shapes else v.sharding.local(name))


def _restore(saved: SavedVariable, v: ModuleVariable) -> None:
    def shard(key: str, name: str) -> Tensor:
        return _shard(saved, v, key, name)

    _restore_weights(saved, v)
    for name in v.masters:
        prefix = f"optimizer/{name}/"
        state = {key.removeprefix(prefix): key for key in saved.shapes if key.startswith(prefix)}
        v.restore_optimizer_state(name, {k: saved.read(key) if k == STEPS else shard(key, name) for k, key in state.items()})
    if saved.facts.marked:
        marked = [key.removeprefix(MARKED) for key in saved.shapes if key.startswith(MARKED)]
        v.marked = {
            name: shard(MARKED + name, name).to(v.offload or v.sharding.local(name).device, copy=True) for name in marked
        }


def estimate(variables: Sequence[ModuleVariable]) -> int:
    """Bytes of the weights, and of the masters and two moments of what is active now, of all processes together."""
    total = 0
    for v in variables:
        saved = v.sharding.parameters.keys() - v.fixed.names
        total += sum(v.parameter(name).element_size() * _numel(v, name) for name in saved)
        total += sum(3 * 4 * _numel(v, name) for name in v.masters)
        total += sum(start.element_size() * _numel(v, name) for name, start in (v.marked or {}).items())
    return total


def state_of(v: ModuleVariable) -> Iterator[tuple[str, Tensor, str | None]]:
    """The variable's weights and persistent buffers: (name, shard, parameter that it is sharded like; None for buffers)."""
    for name in v.sharding.parameters:
        yield name, v.sharding.local(name), name
    for name, buffer in _buffers(v):
        yield name, buffer, None


def _pieces(v: ModuleVariable, processes: Processes) -> Iterator[Piece]:
    """What this process has to write of a variable."""
    for key, shard, parameter in _tensors(v):
        if parameter is None:  # every process has all of it
            shape, here, holder = tuple(shard.shape), range(shard.numel()), (processes.rank, processes.world_size)
        else:
            shape, here, holder = tuple(v.sharding.shape(parameter)), v.sharding.stretch(parameter), v.sharding.holder
        mine = flat_stretch(len(here), -(-len(here) // holder[1]), holder[0])
        yield Piece(key, shape, here.start + mine.start, shard.reshape(-1)[mine.start : mine.stop])


def _tensors(v: ModuleVariable) -> Iterator[tuple[str, Tensor, str | None]]:
    """All tensors that must be saved: (name, shard, parameter that it is sharded like; None where every process has it)."""
    for name, shard, parameter in state_of(v):
        if name not in v.fixed.names:
            yield WEIGHTS + name, shard, parameter
    for name, start in (v.marked or {}).items():
        yield MARKED + name, start, name
    for name, master in v.masters.items():
        if v.has_master(name) and master.dtype != v.parameter(name).dtype:
            yield f"master/{name}", master, name
        for key, value in v.optimizer_state(name).items():  # none where the shard is empty; the first one never is
            yield f"optimizer/{name}/{key}", value, None if key == STEPS else name


def _files(variable: str, processes: Processes) -> list[str]:
    """The files of a variable, by the rank of the process that writes each."""
    count = processes.world_size
    return [f"{variable}-{rank + 1:05d}-of-{count:05d}.safetensors" for rank in range(count)]


def _buffers(v: ModuleVariable) -> Iterator[tuple[str, Tensor]]:
    """The persistent buffers, which are the entries of the state dict that are not parameters."""
    state = v.module.state_dict(keep_vars=True)
    return ((name, buffer) for name, buffer in v.module.named_buffers() if name in state)


def _numel(v: ModuleVariable, name: str) -> int:
    return int(torch.Size(v.sharding.shape(name)).numel())


def _check(saved: SavedVariable, v: ModuleVariable) -> None:
    """Raise `InputError` unless these are the tensors of that variable, above the same ones that never train."""
    if saved.facts.fixed:  # older checkpoints hold these as well
        _check_fixed(saved, v)
    names = [name for name in v.sharding.parameters if name not in saved.facts.fixed]
    expected = {WEIGHTS + name: tuple(v.sharding.shape(name)) for name in names}
    expected |= {WEIGHTS + name: tuple(buffer.shape) for name, buffer in _buffers(v)}
    found = {key: shape for key, shape in saved.shapes.items() if key.startswith(WEIGHTS)}
    odd = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
    if odd:
        raise InputError(
            f"the checkpoint {saved.directory} belongs to a different model: {saved.variable}/{odd[0]} is "
            f"{found.get(odd[0], 'missing')} there and {expected.get(odd[0], 'missing')} here"
        )
    for name in names[:1]:  # all parameters were cast alike
        dtype, here = saved.read(WEIGHTS + name, range(0)).dtype, v.parameter(name).dtype
        if dtype != here:
            raise InputError(
                f"the checkpoint {saved.directory} has another precision: {saved.variable}/{name} is {dtype} there and "
                f"{here} here; set backend.dtype to that of the run"
            )


def _check_fixed(saved: SavedVariable, v: ModuleVariable) -> None:
    """Raise `InputError` unless what never trains is what the run was made with, bit for bit."""
    there, here = saved.facts.fixed, v.fixed.facts(v.sharding)
    name = next((name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)), None)
    if name is None:
        return
    one, other = (
        f"{f.dtype} {f.shape} {f.checksum}" if f is not None else "absent" for f in (there.get(name), here.get(name))
    )
    raise InputError(
        f"the checkpoint {saved.directory} was made above other weights: {saved.variable}/{name}, which does not train, is "
        f"{one} there and {other} here (precision, shape, checksum); give the model that the run began with, in the "
        "precision that it had (backend.dtype)"
    )
