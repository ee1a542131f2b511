"""Where the upper variable may be: closed convex sets, with the projection P onto them, in the Euclidean norm.

The step of x follows the gradient mapping in place of the gradient, and is projected:

    G(x) = (x - P(x - η ∇)) / η,      x <- P(step of the optimizer from x along G)

G is the gradient where the constraint is not active, and zero exactly where no feasible direction descends, so its norm is
the measure of stationarity. For plain gradient descent with step size η this is projected gradient descent: x - η G is
P(x - η ∇). Of an optimizer that scales each entry by a factor of its own, such as AdamW, projected steps along ∇ come to
rest at other points (on a simplex, wherever the signs of all free entries agree). Along G they cannot: x = P(x - D G) with a
positive diagonal D says that <D G, G> <= 0, as x - η G is in the set, so that G = 0.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel.errors import InputError
from bilevel.per_run import PerRun

ROUNDING = 1e-6
"""A start this far outside, relative to its norm, counts as inside: float32 has no closer 1/3, of which three make 1."""


class Constraint(ABC):
    """A closed convex set that holds one parameter of the upper variable."""

    @abstractmethod
    def project(self, value: Tensor) -> Tensor:
        """The nearest point of the set in the Euclidean norm, as a new tensor. The shape and the type stay.

        It is made of operations that `torch.func.vmap` knows, so that many runs can be projected at once.
        """

    def check(self, shape: torch.Size) -> None:  # noqa: B027 (most sets hold tensors of any shape)
        """Raise `InputError` if the set cannot hold a tensor of that shape. By default any shape will do."""


@dataclass(frozen=True, eq=False)
class Box(Constraint):
    """lower <= x <= upper, entry by entry.

    lower, upper: numbers, or tensors that broadcast to the shape of x; -inf and inf leave a side open. Raises `InputError`
        where no number is between the two.
    """

    lower: Any = -math.inf
    upper: Any = math.inf

    def __post_init__(self) -> None:
        low, high = torch.as_tensor(self.lower), torch.as_tensor(self.upper)
        try:
            possible = bool((low <= high).all()) and bool((low < math.inf).all()) and bool((high > -math.inf).all())
        except RuntimeError as error:
            raise InputError(f"the bounds of a Box have shapes {tuple(low.shape)} and {tuple(high.shape)}") from error
        if not possible:
            raise InputError(f"no number is between the bounds of {self}; lower must not be above upper")

    def check(self, shape: torch.Size) -> None:
        """The bounds must broadcast to the shape."""
        for bound in (self.lower, self.upper):
            given = torch.as_tensor(bound).shape
            last = shape[len(shape) - len(given) :]
            if len(given) > len(shape) or any(size not in (1, wanted) for size, wanted in zip(given, last, strict=True)):
                raise InputError(f"a bound of the Box has shape {tuple(given)}, which does not fit the shape {tuple(shape)}")

    def project(self, value: Tensor) -> Tensor:
        """Each entry, moved to the nearer bound where it is outside."""
        low = torch.as_tensor(self.lower, dtype=value.dtype, device=value.device)
        high = torch.as_tensor(self.upper, dtype=value.dtype, device=value.device)
        return torch.minimum(torch.maximum(value, low), high)


@dataclass(frozen=True)
class NonNegative(Constraint):
    """0 <= x, entry by entry."""

    def project(self, value: Tensor) -> Tensor:
        """Each entry, or 0 where it is negative."""
        return value.clamp(min=0)


@dataclass(frozen=True)
class Simplex(Constraint):
    """Entries that are not negative and sum to `total`, along the last dimension: each row of a matrix is a point of it.

    The projection sorts the entries: Held, Wolfe, Crowder, "Validation of subgradient optimization" (Mathematical
    Programming 6, 1974).
    """

    total: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.total < math.inf:
            raise InputError(f"the total of a Simplex must be positive and finite, not {self.total}")

    def project(self, value: Tensor) -> Tensor:
        """max(x - θ, 0), with the θ for which that sums to `total`."""
        ordered = value.sort(-1, descending=True).values
        counts = torch.arange(1, value.shape[-1] + 1, dtype=value.dtype, device=value.device)
        thresholds = (ordered.cumsum(-1) - self.total) / counts
        positive = (ordered > thresholds).sum(-1, keepdim=True)  # the largest entries stay positive
        return (value - thresholds.gather(-1, (positive - 1).clamp(min=0))).clamp(min=0)


def by_parameter(given: Constraint | Mapping[str, Constraint], start: Mapping[str, Tensor]) -> dict[str, Constraint]:
    """The constraint of each parameter of x that has one.

    given: one constraint for every parameter, or one for each of those named.
    start: the parameters by name, at the start.

    Raises `InputError` for an unknown name, a constraint that does not fit a parameter, and a start that is outside. It is
    refused rather than projected: the run would begin at another point than the problem says.
    """
    chosen = dict(given) if isinstance(given, Mapping) else dict.fromkeys(start, given)
    for name, constraint in chosen.items():
        if not isinstance(constraint, Constraint):
            raise InputError(
                f"upper_constraint has {constraint!r} for {name!r}; give a bilevel.Constraint, such as Box(0, 1), "
                "NonNegative() or Simplex(), or a mapping from the names of parameters to constraints"
            )
        if name not in start:
            raise InputError(f"upper_constraint names {name!r}, and the parameters of x are {', '.join(start)}")
        value = start[name]
        if torch.finfo(value.dtype).bits < 32:
            raise InputError(f"x ({name!r}) is in {value.dtype}, which rounds it out of its constraint; hold it in float32")
        constraint.check(value.shape)
        away = float(torch.linalg.vector_norm((constraint.project(value) - value).double()))
        if not away <= ROUNDING * max(1.0, float(torch.linalg.vector_norm(value.double()))):
            raise InputError(
                f"x ({name!r}) starts outside of {constraint}, at a distance of {away:.3g}; let `upper` return a point "
                "inside, such as constraint.project(start)"
            )
    return chosen


def mapping(project: Callable[[Tensor], Tensor], value: Tensor, gradient: Tensor, step: Any) -> Tensor:
    """The gradient mapping (x - P(x - η ∇)) / η; see above. Shapes: those of x.

    step: η, the step size; where it is 0, as in a warm-up, 1 is taken. A number, or a `PerRun`.
    """
    if isinstance(step, PerRun):
        step = PerRun(torch.where(step.values > 0, step.values, 1.0)).like(value)
    elif not step > 0:
        step = 1.0
    moved: Tensor = (value - project(value - step * gradient)) / step
    return moved
