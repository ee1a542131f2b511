"""The true objective Φ(x) = f(x, y*(x)) and its least value, apart from any solver that is compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.optimize
import scipy.sparse.linalg
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
Function = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Reference:
    """Φ of two losses of x and y, the lower one strongly convex in y; everything in float64.

    y: where the search for y*(x) begins; it is kept from one x to the next, which are close to each other.
    """

    f: Function
    g: Function
    x: Array
    y: Array

    def phi(self, x: Array) -> float:
        """Φ(x), with a lower level that is solved to a gradient of 1e-8."""
        self._solve(x)
        return float(self.f(torch.from_numpy(x), torch.from_numpy(self.y)))

    def least(self) -> float:
        """Φ at the minimizer that L-BFGS finds from the start, with implicit gradients."""
        options = {"maxiter": 500, "maxfun": 1000, "ftol": 1e-10, "gtol": 1e-9}
        found = scipy.optimize.minimize(self._phi_and_slope, self.x, jac=True, method="L-BFGS-B", options=options)
        return float(found.fun)

    def gradient(self, x: Array) -> Array:
        """∇Φ(x), by the implicit function theorem."""
        return self._phi_and_slope(x)[1]

    def _solve(self, x: Array) -> None:
        given = torch.from_numpy(x)

        def g_and_slope(flat: Array) -> tuple[float, Array]:
            y = torch.from_numpy(flat).reshape(self.y.shape).requires_grad_()
            value = self.g(given, y)
            (slope,) = torch.autograd.grad(value, y)
            return float(value.detach()), slope.numpy().ravel()

        options = {"maxiter": 2000, "maxfun": 4000, "gtol": 1e-8, "ftol": 0.0, "maxcor": 30}
        found = scipy.optimize.minimize(g_and_slope, self.y.ravel(), jac=True, method="L-BFGS-B", options=options)
        self.y = found.x.reshape(self.y.shape)

    def _phi_and_slope(self, x: Array) -> tuple[float, Array]:
        self._solve(x)
        given = torch.from_numpy(x).requires_grad_()
        y = torch.from_numpy(self.y).requires_grad_()
        value = self.f(given, y)
        of_x, of_y = torch.autograd.grad(value, [given, y], allow_unused=True, materialize_grads=True)
        (slope,) = torch.autograd.grad(self.g(given, y), y, create_graph=True)

        def hessian_times(v: Array) -> Array:
            (product,) = torch.autograd.grad(slope, y, torch.from_numpy(v).reshape(y.shape), retain_graph=True)
            return product.numpy().ravel()

        size = self.y.size
        operator = scipy.sparse.linalg.LinearOperator((size, size), matvec=hessian_times, dtype=np.float64)
        v, failed = scipy.sparse.linalg.cg(operator, of_y.numpy().ravel(), rtol=1e-8, maxiter=5000)
        assert not failed
        (mixed,) = torch.autograd.grad(slope, given, torch.from_numpy(v).reshape(y.shape))
        return float(value.detach()), (of_x - mixed).numpy()


def first_below(phi: Callable[[Array], float], iterates: Sequence[Array], level: float) -> int | None:
    """The number of the first iterate at or below the level, from 0; None if the last one is above, or not finite.

    Found by doubling and bisection: a path that goes below and comes above again may have been below earlier.
    """

    def below(k: int) -> bool:
        x = iterates[k]
        return bool(np.isfinite(x).all()) and bool(np.abs(x).max() < 1e6) and phi(x) <= level

    low, high = -1, 0
    while not below(high):
        if high == len(iterates) - 1:
            return None
        low, high = high, min(2 * high + 1, len(iterates) - 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if below(middle) else (middle, high)
    return high
