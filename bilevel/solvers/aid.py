"""AID: approximate implicit differentiation with conjugate gradients; the second-order reference (Pedregosa, "Hyperparameter
optimization with approximate gradient", ICML 2016, arXiv 1602.02355).

    z <- z - β ∇_y g(x, z)                                       T times
    v <- solution of ∇²_yy g(x, z) v = ∇_y f(x, z)               conjugate gradients
    x <- x - η (∇_x f(x, z) - ∇²_xy g(x, z) v)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bilevel.backend import Backend, Vector
from bilevel.errors import NonFiniteError, RunError
from bilevel.optimizer import SGD, Optimizer
from bilevel.problem import Problem
from bilevel.schedule import Schedule, at
from bilevel.solver import Metrics, Solver, State, Workload
from bilevel.solvers.shared import (
    lower_step,
    place,
    require_all_active,
    require_positive,
    require_second_order,
    require_traits,
)

ROUNDING = 2.0**-52
"""The relative size of a residual beyond which conjugate gradients have nothing left to solve, in float64 or less."""


@dataclass(frozen=True)
class AID(Solver[State]):
    """No penalty and no bias, at the price of second derivatives: the reference for the first-order solvers.

    lr_x: η.
    lr_z: β.
    lower_steps: T. The remaining error of z biases x.
    cg_steps: the largest number of Hessian-vector products; in exact arithmetic the dimension of y is enough.
    cg_tolerance: the largest accepted ‖∇²_yy g v - ∇_y f‖ / ‖∇_y f‖; a run that does not reach it stops. Products are
        computed in the precision of the lower variable: float32 reaches about 1e-5. None: exactly cg_steps products, and
        whatever they leave is accepted, as other packages do. The gradient of x is then off by ∇²_xy g times the error of
        v, which grows with the condition number of g and does not vanish as the run goes on; `cg_residual` is reported, from
        the recursion of conjugate gradients, and nothing watches it.

    Needs a backend with second derivatives, all blocks active, and a lower loss that is strongly convex in y.
    """

    lr_x: Schedule = 0.05
    lr_z: Schedule = 0.1
    lower_steps: int = 10
    cg_steps: int = 100
    cg_tolerance: float | None = 1e-5
    optimizer_x: Optimizer = field(default_factory=SGD)
    optimizer_z: Optimizer = field(default_factory=SGD)

    def __post_init__(self) -> None:
        for name in ("lower_steps", "cg_steps", *(() if self.cg_tolerance is None else ("cg_tolerance",))):
            require_positive(name, getattr(self, name))

    def init(self, problem: Problem[Any], backend: Backend) -> State:
        """Place x and z. Raises `InputError` if the backend or the problem has no second derivatives."""
        require_second_order("aid", backend)
        require_traits("aid", problem, smooth=True, strongly_convex=True)
        return place(problem, backend, ("z",), self.optimizer_x, self.optimizer_z)

    def step(self, t: int, state: State, problem: Problem[Any], backend: Backend) -> Metrics:
        """T steps of z, then one of x."""
        x, z = state.x, state.replicas["z"]
        f, g = problem.upper_loss, problem.lower_loss
        require_all_active("aid", z)
        last = (self.lower_steps + 1) * (t + 1) - 1
        for k in range(last - self.lower_steps, last):
            lower = lower_step(problem, backend, x, z, k, lr=at(self.lr_z, t))

        ζ, ξ = problem.lower_batch(last, backend.shard), problem.upper_batch(last, backend.shard)
        f_z = backend.backward(lambda b: f(x, z, b), ξ, wrt={x: 1, z: 1})
        grad_f = backend.take_gradient(z)

        with backend.second_derivatives(lambda b: g(x, z, b), ζ, z, wrt=(x, z)) as along:

            def hessian_times(p: Vector) -> Vector:
                along(p, {z: 1})
                return backend.take_gradient(z)

            v, residual = conjugate_gradients(
                hessian_times, grad_f, backend, steps=self.cg_steps, tolerance=self.cg_tolerance
            )
            if self.cg_tolerance is not None and not residual <= self.cg_tolerance:
                raise RunError(
                    f"step {t}: conjugate gradients left a residual of {residual:.1e}, above cg_tolerance; "
                    "raise cg_steps or cg_tolerance, or use a higher precision"
                )
            along(v, {x: -1})
        norm = backend.step(x, lr=at(self.lr_x, t))
        return {
            "upper_loss": f_z.value,
            "lower_loss": lower.value,
            "grad_norm_x": norm,
            "cg_residual": residual,
            "lower_parts": lower.parts,
            "upper_parts": f_z.parts,
        }

    def workload(self) -> Workload:
        """T passes for z and one for x; at most cg_steps products for v, one for x, and one if the residual is judged."""
        replicas, products = {"z": self.optimizer_z}, self.cg_steps + (1 if self.cg_tolerance is None else 2)
        return Workload(replicas, lower_passes=self.lower_steps, upper_passes=1, products=products, vectors=4)


def conjugate_gradients(
    times: Callable[[Vector], Vector], b: Vector, backend: Backend, *, steps: int, tolerance: float | None
) -> tuple[Vector, float]:
    """Solve H v = b from v = 0, given H times a vector. Returns v and ‖b - H v‖ / ‖b‖, computed from v itself.

    tolerance: of the residual, at which it ends. None: after `steps` products, or when the residual is nothing but rounding,
        and the residual that is returned is that of the recursion, which costs no product and is too small by rounding.

    Raises `RunError` at a direction of curvature <= 0, where H is not positive definite.
    """
    v, r, p = 0.0 * b, b, b
    bb = rr = backend.dot(b, b)
    if not bb < math.inf:
        raise NonFiniteError("the gradient of f in z is not finite", variable="z")
    if bb == 0:
        return v, 0.0
    # half of the tolerance: r drifts away from b - H v by rounding. Without one, what rounding leaves in any precision
    enough = ROUNDING if tolerance is None else tolerance / 2
    for _ in range(steps):
        Hp = times(p)
        curvature = backend.dot(p, Hp)
        if not curvature > 0:
            raise RunError(
                f"the lower loss is not strongly convex here (curvature {curvature:.1e}), so aid cannot differentiate its "
                "minimizer; add a regularizer to the lower loss, or use meha"
            )
        a = rr / curvature
        v, r = v + a * p, r - a * Hp
        rr, previous = backend.dot(r, r), rr
        if rr <= enough**2 * bb:
            break
        p = r + (rr / previous) * p
    if tolerance is None:
        return v, (rr / bb) ** 0.5
    left = b - times(v)
    return v, (backend.dot(left, left) / bb) ** 0.5
