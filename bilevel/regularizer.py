"""Quadratic terms that a problem adds to its lower loss, without its losses touching parameters, which may be shards.

    g(x, y) + λ/2 ‖y - c‖²,   with c = 0 (weight decay) or where y starts (proximity)

The term is a part of g wherever g is computed, once for each batch: of its value, of its gradient in y, of its second
derivatives, and so of y*(x) and of the hypergradient. It has no gradient in x: a strength that is to be learned belongs into
the loss itself, whose module can return its squared norm.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from bilevel.errors import InputError


@dataclass(frozen=True)
class Regularizer:
    """λ/2 ‖y - c‖², over all parameters of y that can train, whichever blocks are active.

    strength: λ.

    Raises `InputError` unless it is positive and finite.
    """

    strength: float

    anchored: ClassVar[bool] = False
    """Whether c is where y starts, of which a copy is then kept, instead of 0."""

    def __post_init__(self) -> None:
        if not 0 < self.strength < math.inf:
            raise InputError(
                f"the strength of {type(self).__name__} must be positive and finite, not {self.strength}; leave "
                "lower_regularizer out if there is to be none"
            )


class WeightDecay(Regularizer):
    """λ/2 ‖y‖²: L2 regularization, a part of the loss. The `weight_decay` of an optimizer is not, and moves no solution of g
    that a solver knows of."""


class Proximity(Regularizer):
    """λ/2 ‖y - y0‖², where y0 is what y starts from, such as a pretrained model. Takes the memory of one more copy of y."""

    anchored = True
