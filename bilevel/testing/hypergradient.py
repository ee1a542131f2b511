"""The true hypergradient of any problem, by implicit differentiation in float64.

    ∇Φ(x) = ∇_x f - ∇²_xy g [∇²_yy g]⁻¹ ∇_y f      at y*(x)

It needs second derivatives of g, which the solvers of this package avoid. It is a reference for small problems, and not a
method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vjp

from bilevel.errors import BilevelError
from bilevel.problem import Problem, Shard

Values = Mapping[str, Tensor]
DENSE = 1000
"""Up to this many lower parameters the Hessian is formed and factorized; above, conjugate gradients solve with it."""


class NotSolvedError(BilevelError):
    """The lower level could not be solved, or its Hessian is not positive definite there."""


@dataclass(frozen=True)
class Losses:
    """Both losses of a problem as functions of flat vectors, on fixed batches; g with its regularizer."""

    f: Callable[[Tensor, Tensor], Tensor]
    g: Callable[[Tensor, Tensor], Tensor]
    x: _Flat
    y: _Flat

    @staticmethod
    def of(problem: Problem[Any], *, index: int = 0, shard: Shard | None = None) -> Losses:
        """The losses on batch number `index` of either level (which is all data for some problems)."""
        shard = shard or Shard()
        problem.prepare()
        x, y = _Flat(problem.upper().double()), _Flat(problem.lower().double())
        upper, lower = problem.upper_batch(index, shard), problem.lower_batch(index, shard)

        def loss(function: Callable[..., Any], batches: Sequence[Any]) -> Callable[[Tensor, Tensor], Tensor]:
            def value(x_: Tensor, y_: Tensor) -> Tensor:
                results = [function(x.call(x_), y.call(y_), batch) for batch in batches]
                return torch.stack([result[0] if isinstance(result, tuple) else result for result in results]).sum()

            return value

        g, regularizer = loss(problem.lower_loss, lower), problem.lower_regularizer
        if regularizer is None:
            return Losses(loss(problem.upper_loss, upper), g, x, y)
        center = y.start if regularizer.anchored else torch.zeros_like(y.start)

        def regularized(x_: Tensor, y_: Tensor) -> Tensor:
            return g(x_, y_) + regularizer.strength / 2 * (y_ - center).square().sum()

        return Losses(loss(problem.upper_loss, upper), regularized, x, y)


class _Flat:
    """A module as a function of the vector of its trainable parameters."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.parameters = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
        module.requires_grad_(False)

    @property
    def start(self) -> Tensor:
        """The values that the module was built with."""
        return self.join(self.parameters)

    def join(self, values: Values) -> Tensor:
        """Join named values to a vector."""
        return torch.cat([values[name].reshape(-1) for name in self.parameters]).double()

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """Split a vector into named values."""
        parts = torch.split(vector, [p.numel() for p in self.parameters.values()])
        return {name: part.view(p.shape) for (name, p), part in zip(self.parameters.items(), parts, strict=True)}

    def call(self, vector: Tensor) -> Callable[..., Any]:
        """The module's forward at these values."""
        values = self.split(vector)
        return lambda *args, **kwargs: functional_call(self.module, values, args, kwargs)


@dataclass(frozen=True)
class Hypergradient:
    """A hypergradient, by parameter name.

    value: ∇Φ(x).
    y: the lower solution y*(x).
    residual: ‖∇_y g‖ at y.
    """

    value: Values
    y: Values
    residual: float


def hypergradient(
    problem: Problem[Any],
    *,
    x: Values | None = None,
    y: Values | None = None,
    index: int = 0,
    tolerance: float = 1e-12,
    dense: int = DENSE,
) -> Hypergradient:
    """Compute ∇Φ of a problem on its batch number `index`.

    x: the point; by default that at which the problem starts.
    y: the point from which y*(x) is sought; by default that at which the problem starts.
    tolerance: the largest accepted ‖∇_y g‖.
    dense: see `DENSE`.

    Raises `NotSolvedError` if no lower minimum is found.
    """
    losses = Losses.of(problem, index=index)
    x_ = losses.x.start if x is None else losses.x.join(x)
    y_ = losses.y.start if y is None else losses.y.join(y)
    y_ = minimize(lambda v: losses.g(x_, v), y_, tolerance=tolerance, dense=dense)
    grad_y = grad(losses.g, 1)
    v = solve_hessian(lambda w: losses.g(x_, w), y_, grad(losses.f, 1)(x_, y_), dense=dense)
    mixed = grad(lambda at: grad_y(at, y_) @ v)(x_)
    value = grad(losses.f, 0)(x_, y_) - mixed
    return Hypergradient(losses.x.split(value), losses.y.split(y_), float(grad_y(x_, y_).norm()))


def penalized_solution(
    problem: Problem[Any], penalty: float, *, x: Values | None = None, y: Values | None = None, index: int = 0,
    tolerance: float = 1e-12, dense: int = DENSE,
) -> Values:  # fmt: skip
    """y*_α(x) = argmin_y g + f/α, found as in `hypergradient`."""
    return penalized_solutions(problem, [penalty], x=x, y=y, index=index, tolerance=tolerance, dense=dense)[0]


def penalized_solutions(
    problem: Problem[Any], penalties: Sequence[float], *, x: Values | None = None, y: Values | None = None, index: int = 0,
    tolerance: float = 1e-12, dense: int = DENSE,
) -> list[Values]:  # fmt: skip
    """y*_α(x) for several α, each sought from the one before. They share what is known of the second derivatives."""
    losses = Losses.of(problem, index=index)
    x_ = losses.x.start if x is None else losses.x.join(x)
    y_ = losses.y.start if y is None else losses.y.join(y)
    newton = Newton(dense)
    found: list[Values] = []
    for penalty in penalties:

        def penalized(v: Tensor, penalty: float = penalty) -> Tensor:
            return losses.g(x_, v) + losses.f(x_, v) / penalty

        y_ = newton.minimize(penalized, y_, tolerance=tolerance)
        found.append(losses.y.split(y_))
    return found


def minimize(
    function: Callable[[Tensor], Tensor], start: Tensor, *, tolerance: float, dense: int = DENSE, steps: int = 200
) -> Tensor:
    """Find a local minimum by Newton's method with step halving; where the function is not convex, L-BFGS comes first."""
    return Newton(dense).minimize(function, start, tolerance=tolerance, steps=steps)


class Newton:
    """Newton's method, which keeps the factors of a Hessian for as long as they serve.

    dense: see `DENSE`.
    """

    def __init__(self, dense: int = DENSE) -> None:
        self.dense = dense
        self.factor: Tensor | None = None

    def minimize(self, function: Callable[[Tensor], Tensor], start: Tensor, *, tolerance: float, steps: int = 200) -> Tensor:
        """Find a local minimum. Raises `NotSolvedError` if there is none near, or after so many steps."""
        y, near = start, False
        gradient = grad(function)
        slope = gradient(y)
        for _ in range(steps):
            size = float(slope.norm())
            if self.factor is not None and size > 0:
                ahead = y - torch.cholesky_solve(slope[:, None], self.factor)[:, 0]
                slope_ahead = gradient(ahead)
                if float(slope_ahead.norm()) <= size / 4:  # also below the tolerance: such a step costs little
                    y, slope = ahead, slope_ahead
                    continue
            if size <= tolerance:
                return y
            try:
                step = self._step(function, y, slope)
            except NotSolvedError:
                if near:
                    raise
                y, near = _approach(function, y), True
                slope = gradient(y)
                continue
            value, length = function(y), 1.0
            # near the minimum the values no longer differ; there the gradient tells whether a step is good
            while function(y - length * step) > value and gradient(y - length * step).norm() > slope.norm():
                length /= 2
                if length < 1e-8:
                    raise NotSolvedError(f"no step reduces the lower loss, at a gradient norm of {size:.1e}")
            y = y - length * step
            slope = gradient(y)
        raise NotSolvedError(f"the lower level is not solved after {steps} Newton steps")

    def _step(self, function: Callable[[Tensor], Tensor], y: Tensor, slope: Tensor) -> Tensor:
        if y.numel() > self.dense:
            return solve_hessian(function, y, slope, dense=self.dense)
        self.factor = factor_hessian(function, y)
        return torch.cholesky_solve(slope[:, None], self.factor)[:, 0]


def solve_hessian(function: Callable[[Tensor], Tensor], y: Tensor, right: Tensor, *, dense: int = DENSE) -> Tensor:
    """[∇² function(y)]⁻¹ right. Raises `NotSolvedError` if the Hessian is not positive definite."""
    if y.numel() <= dense:
        return torch.cholesky_solve(right[:, None], factor_hessian(function, y))[:, 0]
    pullback = vjp(grad(function), y)[1]
    return conjugate_gradients(lambda v: pullback(v)[0], right)


def factor_hessian(function: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
    """The Cholesky factor of ∇² function(y). Raises `NotSolvedError` if the Hessian is not positive definite."""
    factor, failed = torch.linalg.cholesky_ex(jacrev(grad(function))(y))
    if int(failed):
        raise NotSolvedError("the Hessian of the lower loss is not positive definite; is the lower level regularized?")
    return factor


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], right: Tensor, *, tolerance: float = 1e-13, steps: int = 2000
) -> Tensor:
    """Solve product(v) = right for a symmetric positive definite product, to a relative residual of `tolerance`."""
    v, residual = torch.zeros_like(right), right.clone()
    along, square = residual.clone(), residual @ residual
    goal = tolerance**2 * float(square)
    for _ in range(steps):
        if float(square) <= goal:
            break
        image = product(along)
        curvature = along @ image
        if float(curvature) <= 0:
            raise NotSolvedError("the Hessian of the lower loss is not positive definite; is the lower level regularized?")
        length = square / curvature
        v, residual = v + length * along, residual - length * image
        square, previous = residual @ residual, square
        along = residual + (square / previous) * along
    return v


def _approach(function: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    y = start.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [y], max_iter=2000, history_size=50, tolerance_grad=1e-5, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = function(y)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return y.detach()
