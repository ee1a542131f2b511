"""Save and load variables in the format of `bilevel.checkpoint`, whatever their layout.

Each process writes the tensors that it was dealt, so that nobody ever holds a whole model, and reads only its parts of them.
So a run can go on with another number of processes or another backend.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from bilevel.checkpoint import INDEX, WEIGHTS, SavedVariable
from bilevel.errors import InputError
from bilevel.files import write_atomic
from bilevel_backends.processes import Processes
from bilevel_backends.variable import ModuleVariable


def save(directory: Path, variables: list[ModuleVariable], processes: Processes) -> None:
    """Write the variables into a directory that every process reaches. All processes call it."""
    facts = {}
    for v in variables:
        files = [
            f"{v.name}-{rank + 1:05d}-of-{processes.world_size:05d}.safetensors" for rank in range(processes.world_size)
        ]
        dealt: list[list[str]] = [[] for _ in files]
        bytes_dealt = [0] * len(files)
        mine: dict[str, Tensor] = {}
        for key, part, parameter in _tensors(v):
            owner = bytes_dealt.index(min(bytes_dealt))  # the same choice in every process
            whole = part if parameter is None else v.layout.join(parameter, part, owner)
            bytes_dealt[owner] += part.element_size() * (part.numel() if parameter is None else _numel(v, parameter))
            dealt[owner].append(key)
            if owner == processes.rank:
                assert whole is not None
                mine[key] = whole.detach().to("cpu", copy=True).contiguous()
        save_file(mine, directory / files[processes.rank])
        facts[v.name] = {"active": sorted(v.active), "steps": v.steps, "files": dict(zip(files, dealt, strict=True))}
    if processes.rank == 0:
        write_atomic(directory / INDEX, json.dumps(facts, indent=1))


def load(directory: Path, variables: list[ModuleVariable]) -> None:
    """Read what `save` wrote into variables of the same model. Needs no communication but the layouts' own.

    Raises `InputError`, naming the file, if it is incomplete or of another model or precision; the variables are then as
    they were, but for their active blocks.
    """
    readers = {v.name: SavedVariable(directory, v.name) for v in variables}
    for v in variables:
        v.activate(frozenset(readers[v.name].facts["active"]))
        _check(readers[v.name], v)
    for v in variables:
        reader = readers[v.name]
        with torch.no_grad():
            for name in v.layout.parameters:
                v.layout.part(name).copy_(v.layout.cut(name, reader.read(WEIGHTS + name)))
                v.layout.publish(name)
            for name, buffer in _buffers(v):
                buffer.copy_(reader.read(WEIGHTS + name))
            for name, master in v.masters.items():
                if v.has_master(name) and f"master/{name}" in reader.where:
                    master.copy_(v.layout.cut(name, reader.read(f"master/{name}")))
                elif v.has_master(name):  # written in full precision
                    master.copy_(v.layout.part(name))
                prefix = f"optimizer/{name}/"
                saved = {key.removeprefix(prefix): reader.read(key) for key in reader.where if key.startswith(prefix)}
                state = {key: v.layout.cut(name, value) if value.dim() else value for key, value in saved.items()}
                v.restore_optimizer_state(name, state)
        v.drop_gradients()
        v.steps = int(reader.facts["steps"])


def estimate(variables: list[ModuleVariable]) -> int:
    """Bytes of weights, masters and two moments of what is active now."""
    total = 0
    for v in variables:
        total += sum(p.element_size() * _numel(v, name) for name, p in v.layout.parameters.items())
        total += sum(3 * 4 * _numel(v, name) for name in v.masters)
    return total


def state_of(v: ModuleVariable) -> Iterator[tuple[str, Tensor, str | None]]:
    """Everything of the variable's weights: (name, part, parameter to join it by, or None for a buffer)."""
    for name in v.layout.parameters:
        yield name, v.layout.part(name), name
    for name, buffer in _buffers(v):
        yield name, buffer, None


def _tensors(v: ModuleVariable) -> Iterator[tuple[str, Tensor, str | None]]:
    """All that must be saved, in the same order in every process."""
    for name, part, parameter in state_of(v):
        yield WEIGHTS + name, part, parameter
    for name, master in v.masters.items():
        if v.has_master(name) and master.dtype != v.parameter(name).dtype:
            yield f"master/{name}", master, name
        moments = v.optimizer_state(name)
        if not v.layout.whole:  # a process whose part is empty has no state, but must take part
            moments = _like_the_others(v, master, moments)
        for key in sorted(moments):
            yield f"optimizer/{name}/{key}", moments[key], name if moments[key].dim() else None


def _like_the_others(v: ModuleVariable, master: Tensor, moments: dict[str, Tensor]) -> dict[str, Tensor]:
    scalars = {key: None if value.dim() else value.cpu() for key, value in moments.items()}
    known = next((found for found in v.processes.gather(scalars) if found), {})
    empty = {key: torch.zeros_like(master) if value is None else value for key, value in known.items()}
    return moments or empty


def _buffers(v: ModuleVariable) -> Iterator[tuple[str, Tensor]]:
    """The persistent ones: those that a state dict names and that are not parameters."""
    state = v.module.state_dict(keep_vars=True)
    return ((name, buffer) for name, buffer in v.module.named_buffers() if name in state)


def _numel(v: ModuleVariable, name: str) -> int:
    return int(torch.Size(v.layout.shape(name)).numel())


def _check(saved: SavedVariable, v: ModuleVariable) -> None:
    """Raise `InputError` unless these are the tensors of that variable."""
    expected = {WEIGHTS + name: tuple(v.layout.shape(name)) for name in v.layout.parameters}
    expected |= {WEIGHTS + name: tuple(buffer.shape) for name, buffer in _buffers(v)}
    found = {key: saved.shape(key) for key in saved.where if key.startswith(WEIGHTS)}
    odd = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
    if odd:
        raise InputError(
            f"the checkpoint {saved.directory} belongs to another model: {saved.variable}/{odd[0]} is "
            f"{found.get(odd[0], 'missing')} there and {expected.get(odd[0], 'missing')} here"
        )
    name, parameter = next(iter(v.layout.parameters.items()), (None, None))  # all parameters were cast alike
    if name is not None and parameter is not None and (dtype := saved.read(WEIGHTS + name).dtype) != parameter.dtype:
        raise InputError(
            f"the checkpoint {saved.directory} has another precision: {saved.variable}/{name} is {dtype} there and "
            f"{parameter.dtype} here; set backend.dtype to that of the run"
        )
