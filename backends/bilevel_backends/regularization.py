"""The term that a problem's regularizer adds to the lower loss, computed where the parameters are: shard by shard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.backend import Vector
from bilevel.regularizer import Regularizer
from bilevel_backends.variable import ModuleVariable


@dataclass(frozen=True)
class Regularization:
    """λ/2 ‖y - c‖² of a variable.

    What is active counts as its masters have it, before they are rounded into the parameters.

    regularizer: λ, and whether there is a c.
    anchors: this process's shards of c, by parameter; empty if c is 0.
    """

    regularizer: Regularizer
    anchors: Mapping[str, Tensor]

    @classmethod
    def at(cls, variable: ModuleVariable, regularizer: Regularizer) -> Regularization:
        """The term that is anchored, if it is, at what the variable holds now."""
        names = variable.blocks.parameters(variable.blocks.names) if regularizer.anchored else ()
        return cls(regularizer, {name: variable.sharding.local(name).detach().clone() for name in names})

    def value(self, v: ModuleVariable, precise: torch.dtype) -> float:
        """The term. All processes call it, and get the same number."""
        total = torch.zeros((), dtype=precise)
        for name in v.blocks.parameters(v.blocks.names):
            shard = self._difference(v, name).flatten()[: len(v.sharding.stretch(name))]  # without padding
            norm = torch.linalg.vector_norm(shard, dtype=precise)
            total = total.to(norm.device) + norm.square()
        if not v.sharding.whole:
            total = v.sharding.shards.all_reduce(total)
        return self.regularizer.strength / 2 * float(total)

    def add_gradient(self, v: ModuleVariable, weight: float) -> None:
        """Add weight * λ (y - c) to the variable's gradient, in this process's shards of what is active."""
        for name in v.masters:
            v.add(name, self._difference(v, name), weight * self.regularizer.strength)

    def along(self, v: ModuleVariable, vector: Vector) -> float:
        """λ <y - c, vector>, for a variable that is whole."""
        products = [(self._difference(v, name).double() * vector.parts[name].double()).sum() for name in v.masters]
        return self.regularizer.strength * float(torch.stack(products).sum())

    def _difference(self, v: ModuleVariable, name: str) -> Tensor:
        """This process's shard of y - c."""
        shard = v.masters[name] if name in v.masters else v.sharding.local(name)
        return shard - self.anchors[name].to(shard) if name in self.anchors else shard
