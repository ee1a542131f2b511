"""Settings of a variable's optimizer. Backends build the real optimizer from them."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from bilevel.ranges import Decay, NonNegative, Positive


@dataclass(frozen=True)
class SGD:
    """Gradient descent, optionally with heavy-ball momentum. The optimizer that the convergence theorems are about.

    clip: the largest allowed norm of the variable's whole gradient; longer gradients are scaled down to it. None: no
        clipping.
    """

    momentum: Decay = 0.0
    weight_decay: NonNegative = 0.0
    clip: Positive | None = None
    name: Literal["sgd"] = "sgd"


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (arXiv 1711.05101). Invariant to the gradient's scale, up to `eps`.

    clip: as for `SGD`.
    """

    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.0
    clip: Positive | None = None
    name: Literal["adamw"] = "adamw"


Optimizer = Annotated[SGD | AdamW, Field(discriminator="name")]
