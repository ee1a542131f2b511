"""The lower module of a problem as a planner measures it: parameters by block, and passes traced without values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import ceil

import torch
from torch import Tensor

from bilevel.cost import Cost
from bilevel.errors import InputError
from bilevel.tracing import Pass, replace_parameters, trace_pass


@dataclass(frozen=True)
class Layout:
    """The numbers of a module's parameters, with those that never train.

    before, after: what a forward pass needs before the first repeated block, such as an embedding, and after the last one.
        A module without repeated blocks has all of its parameters before them.
    repeated: each of the repeated blocks.
    """

    before: int
    repeated: tuple[int, ...]
    after: int


class Footprint:
    """A problem's lower module in one precision.

    dtype: the precision of the parameters; None keeps what the problem builds.
    """

    def __init__(self, cost: Cost, dtype: str | None) -> None:
        self.cost = cost
        self.module = cost.build()
        if dtype is not None:
            replace_parameters(self.module, lambda parameter: parameter.to(getattr(torch, dtype)))
        self.blocks = cost.blocks(self.module)
        self._passes: dict[tuple[int, frozenset[str], bool, bool, bool], Pass] = {}

    @cached_property
    def parameters(self) -> int:
        """The number of the module's parameters; tied ones count once."""
        return sum(p.numel() for p in self.module.parameters())

    @cached_property
    def bytes(self) -> int:
        """The bytes of parameters and buffers."""
        return sum(map(self._held, self._named)) + sum(map(_bytes, self.module.buffers()))

    @cached_property
    def fixed_bytes(self) -> int:
        """The bytes of the parameters that are in no block: they never train, and replicas share them."""
        trained = set(self.blocks.parameters(self.blocks.names))
        return sum(self._held(name) for name in self._named if name not in trained)

    @cached_property
    def unpacked_bytes(self) -> int:
        """The bytes of the largest parameter that is unpacked when it is used; 0 if none is packed."""
        return max((_bytes(self._named[name]) for name in self._packed), default=0)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The precision of the parameters; the widest one if they differ."""
        return max((p.dtype for p in self.module.parameters()), key=lambda dtype: dtype.itemsize)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The number of parameters of each block."""
        return {block: sum(p.numel() for p in self._of(block)) for block in self.blocks.members}

    @cached_property
    def layout(self) -> Layout:
        """The module's parameters as a forward pass meets them."""
        before, after = 0, 0
        inside = dict.fromkeys(self.blocks.repeated, 0)
        for name, parameter in self.module.named_parameters():
            block = next((block for block in inside if name.startswith(f"{block}.")), None)
            if block is not None:
                inside[block] += parameter.numel()
            elif any(inside.values()):
                after += parameter.numel()
            else:
                before += parameter.numel()
        return Layout(before, tuple(inside.values()), after)

    def count(self, blocks: frozenset[str]) -> int:
        """The number of parameters of these blocks."""
        return sum(self.sizes[block] for block in blocks)

    def largest(self, blocks: frozenset[str]) -> int:
        """The number of elements of the largest single parameter in these blocks."""
        return max((p.numel() for block in blocks for p in self._of(block)), default=0)

    def passing(
        self, rows: int, active: frozenset[str], *, recompute: bool, upper: bool = False, second_order: bool = False
    ) -> Pass:
        """A pass over a micro-batch of that many rows, in which these blocks train.

        upper: whether this is a pass of the upper loss.
        second_order: whether the loss is differentiated twice.
        """
        key = (rows, active, recompute, upper and self.cost.upper_loss is not None, second_order)
        if key not in self._passes:
            self._passes[key] = self._trace(*key)
        return self._passes[key]

    def _trace(self, rows: int, active: frozenset[str], recompute: bool, upper: bool, second_order: bool) -> Pass:
        loss = self.cost.upper_loss if upper and self.cost.upper_loss is not None else self.cost.loss
        try:
            return trace_pass(
                self.module,
                lambda: loss(self.module, rows),
                trained=frozenset(self.blocks.parameters(active)),
                repeated=self.blocks.repeated,
                recompute=recompute,
                second_order=second_order,
            )
        except (RuntimeError, NotImplementedError) as error:
            level = "upper" if upper else "lower"
            raise InputError(f"a pass of the {level} loss cannot be traced without values: {error}") from error

    def _held(self, name: str) -> int:
        """The bytes in which a parameter is held."""
        return round(self._packed[name]) if name in self._packed else _bytes(self._named[name])

    @cached_property
    def _packed(self) -> Mapping[str, float]:
        return self.cost.packed(self.module) if self.cost.packed is not None else {}

    def _of(self, block: str) -> list[Tensor]:
        return [self._named[name] for name in self.blocks.members[block]]

    @cached_property
    def _named(self) -> dict[str, Tensor]:
        return dict(self.module.named_parameters())


def share(rows: int, processes: int) -> int:
    """The rows of the process that has the most."""
    return ceil(rows / processes)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
