"""Save and load variables in the format of `bilevel.checkpoint`, however they are sharded.

Each process writes the tensors that it was assigned, so that no process ever holds a whole model, and reads only its shards
of them. A run can therefore be resumed with another number of processes or another backend.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from bilevel.checkpoint import INDEX, WEIGHTS, SavedVariable, VariableFacts
from bilevel.errors import InputError
from bilevel.files import named, write_atomic
from bilevel_backends.processes import Processes
from bilevel_backends.variable import ModuleVariable

MARKED = "marked/"


def save(directory: Path, variables: list[ModuleVariable], processes: Processes) -> list[str]:
    """Write the variables into a directory that every process reaches. All processes call it.

    Returns the names of the files that this process has written. Raises `OSError`, naming the file, if one cannot be.
    """
    facts, written = {}, []
    for v in variables:
        files = [
            f"{v.name}-{rank + 1:05d}-of-{processes.world_size:05d}.safetensors" for rank in range(processes.world_size)
        ]
        assigned: list[list[str]] = [[] for _ in files]
        bytes_assigned = [0] * len(files)
        mine: dict[str, Tensor] = {}
        for key, shard, parameter in _tensors(v):
            owner = bytes_assigned.index(min(bytes_assigned))  # the same choice in every process
            whole = shard if parameter is None else v.sharding.gather(parameter, shard, owner)
            bytes_assigned[owner] += shard.element_size() * (shard.numel() if parameter is None else _numel(v, parameter))
            assigned[owner].append(key)
            if owner == processes.rank:
                assert whole is not None
                mine[key] = whole.detach().to("cpu", copy=True).contiguous()
        written.append(files[processes.rank])
        with named(directory / written[-1]):
            save_file(mine, directory / written[-1])
        by_file = dict(zip(files, assigned, strict=True))
        facts[v.name] = asdict(VariableFacts(sorted(v.active), v.steps, v.marked is not None, by_file))
    if processes.rank == 0:
        written.append(INDEX)
        write_atomic(directory / INDEX, json.dumps(facts, indent=1))
    return written


def load(directory: Path, variables: list[ModuleVariable]) -> None:
    """Read what `save` wrote into variables of the same model. Communicates only as sharding requires.

    Raises `InputError`, naming the file, if it is incomplete or belongs to a different model or precision; the variables are
    then as they were, except for their active blocks.
    """
    readers = {v.name: SavedVariable(directory, v.name) for v in variables}
    for v in variables:
        v.activate(frozenset(readers[v.name].facts.active))
        _check(readers[v.name], v)
    for v in variables:
        reader = readers[v.name]
        with torch.no_grad():
            for name in v.sharding.parameters:
                v.sharding.local(name).copy_(v.sharding.shard(name, reader.read(WEIGHTS + name)))
                v.sharding.all_gather([name])
            for name, buffer in _buffers(v):
                buffer.copy_(reader.read(WEIGHTS + name))
            for name, master in v.masters.items():
                if v.has_master(name) and f"master/{name}" in reader.where:
                    master.copy_(v.sharding.shard(name, reader.read(f"master/{name}")))
                elif v.has_master(name):  # written in full precision
                    master.copy_(v.sharding.local(name))
                prefix = f"optimizer/{name}/"
                saved = {key.removeprefix(prefix): reader.read(key) for key in reader.where if key.startswith(prefix)}
                state = {key: v.sharding.shard(name, value) if value.dim() else value for key, value in saved.items()}
                v.restore_optimizer_state(name, state)
        if reader.facts.marked:
            marked = [key.removeprefix(MARKED) for key in reader.where if key.startswith(MARKED)]
            v.marked = {}
            for name in marked:
                start = v.sharding.shard(name, reader.read(MARKED + name))
                v.marked[name] = start.to(v.offload or v.sharding.local(name).device)
        v.drop_gradients()
        v.steps = reader.facts.steps


def estimate(variables: list[ModuleVariable]) -> int:
    """Bytes of the weights, and of the masters and two moments of what is active now."""
    total = 0
    for v in variables:
        total += sum(p.element_size() * _numel(v, name) for name, p in v.sharding.parameters.items())
        total += sum(3 * 4 * _numel(v, name) for name in v.masters)
        total += sum(start.element_size() * _numel(v, name) for name, start in (v.marked or {}).items())
    return total


def state_of(v: ModuleVariable) -> Iterator[tuple[str, Tensor, str | None]]:
    """The variable's weights and persistent buffers: (name, shard, parameter that it is sharded like; None for buffers)."""
    for name in v.sharding.parameters:
        yield name, v.sharding.local(name), name
    for name, buffer in _buffers(v):
        yield name, buffer, None


def optimizer_state_of(v: ModuleVariable, name: str) -> dict[str, Tensor]:
    """The optimizer's tensors for one active parameter (shards, and scalars): the same keys in every process, in order."""
    moments = v.optimizer_state(name)
    if not v.sharding.whole:  # a process whose shard is empty has no state, but must take part
        moments = _like_the_others(v, v.masters[name], moments)
    return dict(sorted(moments.items()))


def _tensors(v: ModuleVariable) -> Iterator[tuple[str, Tensor, str | None]]:
    """All tensors that must be saved, in the same order in every process."""
    for name, shard, parameter in state_of(v):
        yield WEIGHTS + name, shard, parameter
    for name, start in (v.marked or {}).items():
        yield MARKED + name, start, name
    for name, master in v.masters.items():
        if v.has_master(name) and master.dtype != v.parameter(name).dtype:
            yield f"master/{name}", master, name
        for key, value in optimizer_state_of(v, name).items():
            yield f"optimizer/{name}/{key}", value, name if value.dim() else None


def _like_the_others(v: ModuleVariable, master: Tensor, moments: dict[str, Tensor]) -> dict[str, Tensor]:
    scalars = {key: None if value.dim() else value.cpu() for key, value in moments.items()}
    known = next((found for found in v.processes.all_gather_object(scalars) if found), {})
    empty = {key: torch.zeros_like(master) if value is None else value for key, value in known.items()}
    return moments or empty


def _buffers(v: ModuleVariable) -> Iterator[tuple[str, Tensor]]:
    """The persistent buffers, which are the entries of the state dict that are not parameters."""
    state = v.module.state_dict(keep_vars=True)
    return ((name, buffer) for name, buffer in v.module.named_buffers() if name in state)


def _numel(v: ModuleVariable, name: str) -> int:
    return int(torch.Size(v.sharding.shape(name)).numel())


def _check(saved: SavedVariable, v: ModuleVariable) -> None:
    """Raise `InputError` unless these are the tensors of that variable."""
    expected = {WEIGHTS + name: tuple(v.sharding.shape(name)) for name in v.sharding.parameters}
    expected |= {WEIGHTS + name: tuple(buffer.shape) for name, buffer in _buffers(v)}
    found = {key: saved.shape(key) for key in saved.where if key.startswith(WEIGHTS)}
    odd = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
    if odd:
        raise InputError(
            f"the checkpoint {saved.directory} belongs to a different model: {saved.variable}/{odd[0]} is "
            f"{found.get(odd[0], 'missing')} there and {expected.get(odd[0], 'missing')} here"
        )
    name, parameter = next(iter(v.sharding.parameters.items()), (None, None))  # all parameters were cast alike
    if name is not None and parameter is not None and (dtype := saved.read(WEIGHTS + name).dtype) != parameter.dtype:
        raise InputError(
            f"the checkpoint {saved.directory} has another precision: {saved.variable}/{name} is {dtype} there and "
            f"{parameter.dtype} here; set backend.dtype to that of the run"
        )
