"""What several solvers share: their variables, a step of one lower variable, and the numbers of a step."""

from collections.abc import Sequence
from typing import Any

from bilevel.backend import Backend, Evaluation, Variable
from bilevel.errors import InputError
from bilevel.optimizer import SGD, AdamW
from bilevel.problem import Problem
from bilevel.schedule import Schedule
from bilevel.solver import Metrics, State


def place(
    problem: Problem[Any], backend: Backend, lower: Sequence[str], optimizer_x: SGD | AdamW, optimizer_lower: SGD | AdamW
) -> State:
    """Place x, and a lower variable of each name. These start equal and have the same optimizer settings."""
    x = backend.place("x", problem.upper, optimizer_x, sharded=False)
    first = backend.place(lower[0], problem.lower, optimizer_lower, sharded=True, blocks=problem.blocks)
    return State(x, {lower[0]: first, **{name: backend.replicate(first, name) for name in lower[1:]}})


def lower_step(
    problem: Problem[Any], backend: Backend, x: Variable, y: Variable, index: int, *, lr: float, tilt: float | None = None
) -> Evaluation:
    """One step of y on g + tilt * f, with minibatch number `index`. Returns g before the step."""
    ζ = problem.lower_batch(index, backend.shard)
    lower = backend.backward(lambda b: problem.lower_loss(x, y, b), ζ, wrt={y: 1})
    if tilt is not None:
        ξ = problem.upper_batch(index, backend.shard)
        backend.backward(lambda b: problem.upper_loss(x, y, b), ξ, wrt={y: tilt})
    backend.step(y, lr=lr)
    return lower


def report(
    *, upper: Evaluation, lower: Evaluation, gap: Evaluation, penalty: float, grad_norm_x: float | None = None
) -> Metrics:
    """The numbers of a step: f(y), g(z), the gap g(y) - g(z), their parts, and the norm of x's gradient, if it has one."""
    return {
        "upper_loss": upper.value,
        "lower_loss": lower.value,
        "gap": gap.value,
        "penalty": penalty,
        **({} if grad_norm_x is None else {"grad_norm_x": grad_norm_x}),
        "gap_parts": gap.parts,
        "lower_parts": lower.parts,
        "upper_parts": upper.parts,
    }


def require_positive(name: str, value: Schedule) -> None:
    """Raise `ValueError` unless the setting is positive (if it is a schedule, at step 0)."""
    if not (value(0) if callable(value) else value) > 0:
        raise ValueError(f"{name} must be positive, not {value}")


def require_traits(solver: str, problem: Problem[Any], *, smooth: bool = False, strongly_convex: bool = False) -> None:
    """Raise `InputError` if the problem declares that it lacks what the solver needs."""
    for needed, has, trait in (
        (smooth, problem.smooth, "second derivatives"),
        (strongly_convex, problem.strongly_convex, "a lower loss that is strongly convex in y"),
    ):
        if needed and has is False:
            raise InputError(
                f"{solver} needs {trait}, and the problem {type(problem).__name__} says that it has none; "
                "choose a solver that does not need it (scalebio, bome, meha), or regularize the lower loss"
            )


def require_second_order(solver: str, backend: Backend) -> None:
    """Raise `InputError` unless the backend has second derivatives."""
    if not backend.second_order:
        raise InputError(
            f"{solver} needs second derivatives, which the backend {type(backend).__name__} does not provide as it is set; "
            "choose the torch backend without compile, or a first-order solver (f2sa, f2ba, scalebio)"
        )


def require_all_active(solver: str, variable: Variable) -> None:
    """Raise `InputError` if a part of the variable is frozen: second derivatives would leave that part out."""
    if variable.active != variable.blocks.names:
        raise InputError(
            f"{solver} would converge to another point with some blocks of the lower variable frozen; "
            "use `active: {name: all}`, or a first-order solver (f2sa, f2ba, scalebio)"
        )
