"""What a batch is made of: a tensor, or a tuple, list, mapping or dataclass of tensors and of values that are none."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

from torch import Tensor


def map_tensors(change: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """The same batch with other tensors. Parts in which nothing changes and that cannot be changed are kept as they are."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, int | float | str) or batch is None:
        return batch
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return _map_dataclass(change, batch)
    if isinstance(batch, Mapping):
        return {key: map_tensors(change, value) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(change, value) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(map_tensors(change, value) for value in batch)
    return batch


def leaves(batch: Any) -> Iterator[Any]:
    """The tensors and the other values of a batch, in an order that depends on its form alone."""
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        yield type(batch)
        for name in _fields(type(batch)):
            yield from leaves(getattr(batch, name))
    elif isinstance(batch, Mapping):
        yield (type(batch), *batch)
        for value in batch.values():
            yield from leaves(value)
    elif isinstance(batch, tuple | list):
        yield (type(batch), len(batch))
        for value in batch:
            yield from leaves(value)
    else:
        yield batch


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """The tensors of a batch, in the order of `leaves`."""
    return (leaf for leaf in leaves(batch) if isinstance(leaf, Tensor))


def _map_dataclass(change: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """The batch itself, if it cannot be changed and nothing does change."""
    kind: Any = type(batch)
    moved = {}
    for name in _fields(kind):
        value = getattr(batch, name)
        there = map_tensors(change, value)
        if there is not value:
            moved[name] = there
    frozen = kind.__dataclass_params__.frozen
    return batch if frozen and not moved else dataclasses.replace(batch, **moved)


@cache
def _fields(kind: Any) -> tuple[str, ...]:
    """The fields of a dataclass that can be given."""
    return tuple(f.name for f in dataclasses.fields(kind) if f.init)
