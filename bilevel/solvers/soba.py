"""SOBA: z, v and x move together, each along its own direction (Dagréou, Ablin, Vaiter, Moreau, "A framework for bilevel
optimization that enables stochastic and global variance reduction algorithms", NeurIPS 2022, arXiv 2201.13409).

    z <- z - ρ ∇_y g(x, z)
    v <- v - ρ (∇²_yy g(x, z) v + ∇_y f(x, z))
    x <- x - γ (∇²_xy g(x, z) v + ∇_x f(x, z))

all three computed at the same (x, z, v) before any of them moves. With x held, v goes to -[∇²_yy g]⁻¹ ∇_y f, at which the
direction of x is ∇Φ(x).
"""

from dataclasses import dataclass, field
from typing import Any

from bilevel.backend import Backend
from bilevel.optimizer import SGD, Optimizer
from bilevel.problem import Problem
from bilevel.schedule import Schedule, at
from bilevel.solver import Metrics, Solver, State, Workload
from bilevel.solvers.shared import place, require_all_active, require_second_order, require_traits


@dataclass(frozen=True)
class SOBA(Solver[State]):
    """One product of second derivatives in a step, and no inner loop: v is carried along as z is.

    lr_x: γ.
    lr_z: ρ of z. With plain steps, at most about 1/L, where L is the largest curvature of g in y.
    lr_v: ρ of v; None takes lr_z, as in the paper.
    optimizer_x, optimizer_z: the update rules. That of v is plain gradient descent, as weight decay or a limit to the
        gradient would move the solution of the linear system.

    v is a lower variable in shape, precision and place, so a checkpoint keeps it; it starts at 0. x must move more slowly
    than z and v can follow: lower lr_x, or let it fall, if the steps of x do not settle.

    Needs a backend with second derivatives, all blocks active, and a lower loss that is strongly convex in y. On a lower
    loss that is not, v grows without bound and the run stops, when a number is no longer finite.
    """

    lr_x: Schedule = 0.05
    lr_z: Schedule = 0.1
    lr_v: Schedule | None = None
    optimizer_x: Optimizer = field(default_factory=SGD)
    optimizer_z: Optimizer = field(default_factory=SGD)

    def init(self, problem: Problem[Any], backend: Backend) -> State:
        """Place x, z, and v at 0. Raises `InputError` if the backend or the problem has no second derivatives."""
        require_second_order("soba", backend)
        require_traits("soba", problem, smooth=True, strongly_convex=True)
        state = place(problem, backend, ("z",), self.optimizer_x, self.optimizer_z)
        v = backend.replicate(state.replicas["z"], "v", SGD())
        backend.activate(v, v.blocks.names)
        backend.write(v, 0.0 * backend.read(v))
        return State(state.x, {**state.replicas, "v": v})

    def step(self, t: int, state: State, problem: Problem[Any], backend: Backend) -> Metrics:
        """The three directions at the same point, then the three steps."""
        x, z, v = state.x, state.replicas["z"], state.replicas["v"]
        f, g = problem.upper_loss, problem.lower_loss
        lr_z = at(self.lr_z, t)
        require_all_active("soba", z)
        ζ, ξ = problem.lower_batch(t, backend.shard), problem.upper_batch(t, backend.shard)

        f_z = backend.backward(lambda b: f(x, z, b), ξ, wrt={x: 1, z: 1})
        grad_f, v_now = backend.take_gradient(z), backend.read(v)
        with backend.second_derivatives(lambda b: g(x, z, b), ζ, z, wrt=(x, z)) as derivatives:
            g_z, grad_g = derivatives.gradient()
            derivatives(v_now, {x: 1, z: 1})
        backend.add_gradient(v, grad_f)
        backend.add_gradient(v, backend.take_gradient(z))
        backend.add_gradient(z, grad_g)

        backend.step(z, lr=lr_z)
        backend.step(v, lr=lr_z if self.lr_v is None else at(self.lr_v, t))
        norm = backend.step(x, lr=at(self.lr_x, t))
        return {
            "upper_loss": f_z.value,
            "lower_loss": g_z.value,
            "grad_norm_x": norm,
            "lower_parts": g_z.parts,
            "upper_parts": f_z.parts,
        }

    def workload(self) -> Workload:
        """One pass and one product for z, and one pass for x and v; beside a pass, the direction of z and v are held."""
        return Workload({"z": self.optimizer_z, "v": SGD()}, lower_passes=1, upper_passes=1, products=1, vectors=3)
