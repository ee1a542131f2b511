"""Wrong implementations, each with the claim that has to catch it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any, ClassVar, Literal
from unittest import mock

import numpy as np

from bilevel import (
    BOME,
    F2SA,
    F3SA,
    LISA,
    MEHA,
    PBGD,
    Backend,
    Distribution,
    F2SAp,
    Metrics,
    Power,
    Problem,
    Rounds,
    ScaleBiO,
    State,
)
from bilevel.backend import Evaluation
from bilevel.errors import BilevelError
from bilevel.schedule import at
from bilevel.solvers import f2sa, f2sa_p, f3sa
from bilevel.solvers.shared import lower_step
from bilevel.verify.claims import Check, Reading
from bilevel_problems.quadratic_forms import QuadraticForms
from bilevel_theory import finite_horizon, sfo_exponent
from bilevel_theory.block_sampling import BlockSampling
from bilevel_theory.bome_rate import BOMERate
from bilevel_theory.closed_forms import ClosedForms
from bilevel_theory.condition_number import ConditionNumber
from bilevel_theory.f2sa_rate import F2SARate
from bilevel_theory.f3sa_rate import F3SARate
from bilevel_theory.finite_horizon import FiniteHorizon
from bilevel_theory.fixed_penalty import FixedPenalty
from bilevel_theory.higher_order import HigherOrder
from bilevel_theory.implicit_agreement import ImplicitAgreement
from bilevel_theory.interior_weights import InteriorWeights
from bilevel_theory.linear_rate import LinearRate
from bilevel_theory.linear_system import StepSizes
from bilevel_theory.lower_distance import LowerDistance
from bilevel_theory.meha_rate import MEHARate
from bilevel_theory.nonconvex_rate import NonconvexRate
from bilevel_theory.optimal_weights import OptimalWeights
from bilevel_theory.pbgd_rate import PBGDRate
from bilevel_theory.penalty_bias import PenaltyBias
from bilevel_theory.sfo_exponent import SFOExponent
from bilevel_theory.shared_minibatch import SharedMinibatch
from bilevel_theory.stable_step import OwnMasks, StableStep

Weight = Callable[[float], float]


@dataclass(frozen=True)
class Wrong(ScaleBiO):
    """ScaleBiO's single loop with its weights open to error. As they stand here, they are right."""

    x_gy: ClassVar[Weight] = staticmethod(lambda α: α)
    x_gz: ClassVar[Weight] = staticmethod(lambda α: -α)
    x_f: ClassVar[Weight] = staticmethod(lambda α: 1.0)
    y_f: ClassVar[Weight] = staticmethod(lambda α: 1 / α)
    f_at: ClassVar[Literal["y", "z"]] = "y"
    x_moves: ClassVar[Literal["together", "last"]] = "together"
    other_batch: ClassVar[int] = 0
    y_step: ClassVar[float] = 1.0

    def step(self, t: int, state: State, problem: Problem[Any], backend: Backend) -> Metrics:
        x, y, z = state.x, state.replicas["y"], state.replicas["z"]
        f, g, α = problem.upper_loss, problem.lower_loss, at(self.penalty, t)
        lr_z = at(self.lr_z, t)
        lr_y = self.y_step * (lr_z if self.lr_y is None else at(self.lr_y, t))
        for k in range(self.lower_steps * t, self.lower_steps * (t + 1)):
            ζ, ξ = problem.lower_batch(k, backend.shard), problem.upper_batch(k, backend.shard)
            η = problem.lower_batch(k + self.other_batch, backend.shard)

            def move_lower(ζ: Any = ζ, ξ: Any = ξ, η: Any = η) -> None:
                backend.backward(lambda b: g(x, z, b), η, wrt={z: 1})
                backend.backward(lambda b: g(x, y, b), ζ, wrt={y: 1})
                backend.backward(lambda b: f(x, y, b), ξ, wrt={y: type(self).y_f(α)})
                backend.step(z, lr=lr_z)
                backend.step(y, lr=lr_y)

            T = self.lower_steps
            if self.x_moves == "last":
                move_lower()
            g_z = backend.backward(lambda b: g(x, z, b), η, wrt={x: type(self).x_gz(α) / T})
            g_y = backend.backward(lambda b: g(x, y, b), ζ, wrt={x: type(self).x_gy(α) / T})
            at_ = y if self.f_at == "y" else z
            f_y = backend.backward(partial(f, x, at_), ξ, wrt={x: type(self).x_f(α) / T})
            if self.x_moves == "together":
                move_lower()
        backend.step(x, lr=at(self.lr_x, t))
        return {"upper_loss": f_y.value, "lower_loss": g_z.value, "gap": (g_y - g_z).value, "penalty": α}


def wrong(base: type[Any] = Wrong, **weights: Any) -> type[Any]:
    """A subclass with these weights."""
    values = {name: staticmethod(value) if callable(value) else value for name, value in weights.items()}
    return dataclasses.dataclass(frozen=True)(type(base.__name__, (base,), values))


DROPPED = wrong(x_gz=lambda α: 0.0)
FREE = wrong(x_gz=lambda α: 0.0, x_gy=lambda α: 0.0)
NEGATED = wrong(x_gz=lambda α: α, x_gy=lambda α: -α)


@dataclass(frozen=True)
class Aliased(ScaleBiO):
    """y is z."""

    def init(self, problem: Problem[Any], backend: Backend) -> State:
        state = super().init(problem, backend)
        return State(state.x, {"y": state.replicas["z"], "z": state.replicas["z"]}, state.memory)

    def step(self, t: int, state: State, problem: Problem[Any], backend: Backend) -> Metrics:
        x, z, α = state.x, state.replicas["z"], at(self.penalty, t)
        ζ, ξ = problem.lower_batch(t, backend.shard), problem.upper_batch(t, backend.shard)
        g_z = backend.backward(lambda b: problem.lower_loss(x, z, b), ζ, wrt={z: 1})
        f_z = backend.backward(lambda b: problem.upper_loss(x, z, b), ξ, wrt={x: 1, z: 1 / α})
        backend.step(z, lr=at(self.lr_z, t))
        backend.step(x, lr=at(self.lr_x, t))
        return {"upper_loss": f_z.value, "lower_loss": g_z.value, "gap": 0.0}


@dataclass(frozen=True)
class ColdStart(ScaleBiO):
    """y and z start from 0 at every step of x."""

    def step(self, t: int, state: State, problem: Problem[Any], backend: Backend) -> Metrics:
        for variable in state.replicas.values():
            backend.write(variable, 0.0 * backend.read(variable))
        return super().step(t, state, problem, backend)


@dataclass(frozen=True)
class OneSided(F2SAp):
    """∇_x f at y_1 alone, instead of the combination of all nodes."""

    def step(self, t: int, state: State, problem: Problem[Any], backend: Backend) -> Metrics:
        λ, x, shard = at(self.penalty, t), state.x, backend.shard
        batches = problem.lower_batch(t, shard), problem.upper_batch(t, shard)
        for j, c in RIGHT_DIFFERENCE(self.p).items():
            y = state.replicas[f"y{j:+d}"]
            for _ in range(self.lower_steps):
                backend.backward(partial(problem.lower_loss, x, y), batches[0], wrt={y: 1})
                backend.backward(partial(problem.upper_loss, x, y), batches[1], wrt={y: j / λ})
                backend.step(y, lr=at(self.lr_z, t))
            backend.backward(partial(problem.lower_loss, x, y), batches[0], wrt={x: float(c) * λ})
            if j == 1:
                backend.backward(partial(problem.upper_loss, x, y), batches[1], wrt={x: 1})
        backend.step(x, lr=at(self.lr_x, t))
        return {}


@dataclass(frozen=True)
class WrongPBGD(PBGD):
    """PBGD's value gap with its weights open to error. As they stand here, they are right."""

    x_gy: ClassVar[Weight] = staticmethod(lambda γ: γ)
    x_gz: ClassVar[Weight] = staticmethod(lambda γ: -γ)
    x_f: ClassVar[Weight] = staticmethod(lambda γ: 1.0)
    y_f: ClassVar[Weight] = staticmethod(lambda γ: 1 / γ)
    z_moves: ClassVar[bool] = True

    def step(self, t: int, state: State, problem: Problem[Any], backend: Backend) -> Metrics:
        if self.kind != "value-gap":
            return super().step(t, state, problem, backend)
        x, y, z, γ = state.x, state.replicas["y"], state.replicas["z"], at(self.penalty, t)
        for _ in range(self.lower_steps if self.z_moves else 0):
            lower_step(problem, backend, x, z, t, lr=at(self.lr_z, t))
        ζ, ξ = problem.lower_batch(t, backend.shard), problem.upper_batch(t, backend.shard)
        backend.backward(lambda b: problem.lower_loss(x, z, b), ζ, wrt={x: type(self).x_gz(γ)})
        backend.backward(lambda b: problem.lower_loss(x, y, b), ζ, wrt={x: type(self).x_gy(γ), y: 1})
        backend.backward(lambda b: problem.upper_loss(x, y, b), ξ, wrt={x: type(self).x_f(γ), y: type(self).y_f(γ)})
        backend.step(y, lr=at(self.lr_z if self.lr_y is None else self.lr_y, t))
        backend.step(x, lr=at(self.lr_x, t))
        return {}


@dataclass(frozen=True)
class HalfProduct(PBGD):
    """The gradient of ‖∇_y g‖² without the factor of 2 that the product rule gives."""

    def _gradient_norm(self, t: int, γ: float, state: State, problem: Problem[Any], backend: Backend) -> Any:
        x, y, ζ = state.x, state.replicas["y"], problem.lower_batch(t, backend.shard)
        lower = backend.backward(lambda b: problem.lower_loss(x, y, b), ζ, wrt={y: 1})
        v = backend.take_gradient(y)
        norm = backend.backward_along(lambda b: problem.lower_loss(x, y, b), ζ, y, v, wrt={x: γ, y: 1})
        return t, lower, Evaluation(norm)


@dataclass(frozen=True)
class WrongBOME(BOME):
    """BOME with its multiplier and its terms open to error. As they stand here, they are right."""

    multiplier: ClassVar[Callable[[float, float, float], float]] = staticmethod(lambda η, f_q, q_q: max(η - f_q / q_q, 0.0))
    x_gz: ClassVar[float] = -1.0
    y_f: ClassVar[float] = 1.0
    restart: ClassVar[bool] = True

    def step(self, t: int, state: State, problem: Problem[Any], backend: Backend) -> Metrics:
        x, y, z = state.x, state.replicas["y"], state.replicas["z"]
        if self.restart:
            backend.assign(z, y)
        for _ in range(self.lower_steps):
            lower_step(problem, backend, x, z, t, lr=at(self.lr_z, t))
        ζ, ξ = problem.lower_batch(t, backend.shard), problem.upper_batch(t, backend.shard)
        backend.backward(lambda b: problem.lower_loss(x, z, b), ζ, wrt={x: type(self).x_gz})
        backend.backward(lambda b: problem.lower_loss(x, y, b), ζ, wrt={x: 1, y: 1})
        grad_q = {v: backend.take_gradient(v) for v in (x, y)}
        backend.backward(lambda b: problem.upper_loss(x, y, b), ξ, wrt={x: 1, y: type(self).y_f})
        grad_f = {v: backend.take_gradient(v) for v in (x, y)}
        f_q = sum(backend.dot(grad_f[v], grad_q[v]) for v in (x, y))
        q_q = sum(backend.dot(grad_q[v], grad_q[v]) for v in (x, y))
        λ = type(self).multiplier(self.eta, f_q, q_q) if q_q > 0 else 0.0
        for v in (x, y):
            backend.add_gradient(v, grad_f[v])
            backend.add_gradient(v, grad_q[v], λ)
            backend.step(v, lr=at(self.lr_x, t))
        return {}


@dataclass(frozen=True)
class WrongMEHA(MEHA):
    """MEHA with its penalty and its terms open to error. As they stand here, they are right."""

    used: ClassVar[Callable[[Any, int], float]] = staticmethod(at)
    x_gz: ClassVar[float] = -1.0
    y_f: ClassVar[Weight] = staticmethod(lambda c: 1 / c)
    x_f: ClassVar[Weight] = staticmethod(lambda c: 1 / c)
    y_proximal: ClassVar[float] = 1.0
    z_proximal: ClassVar[float] = 1.0

    def step(self, t: int, state: State, problem: Problem[Any], backend: Backend) -> Metrics:
        x, y, z, lr_z, kind = state.x, state.replicas["y"], state.replicas["z"], at(self.lr_z, t), type(self)
        c = kind.used(self.penalty, t)
        ζ, ξ = problem.lower_batch(t, backend.shard), problem.upper_batch(t, backend.shard)
        backend.backward(lambda b: problem.lower_loss(x, z, b), ζ, wrt={z: 1})
        backend.add_gradient(z, backend.read(z) - backend.read(y), kind.z_proximal / self.gamma)
        backend.step(z, lr=lr_z)
        backend.backward(lambda b: problem.lower_loss(x, z, b), ζ, wrt={x: kind.x_gz})
        backend.backward(lambda b: problem.lower_loss(x, y, b), ζ, wrt={x: 1, y: 1})
        backend.backward(lambda b: problem.upper_loss(x, y, b), ξ, wrt={x: kind.x_f(c), y: kind.y_f(c)})
        backend.add_gradient(y, backend.read(y) - backend.read(z), -kind.y_proximal / self.gamma)
        backend.step(y, lr=lr_z if self.lr_y is None else at(self.lr_y, t))
        backend.step(x, lr=at(self.lr_x, t))
        return {}


@dataclass(frozen=True)
class Twice(F2SAp):
    """λ/4 times ∇_x g(y_1) added and subtracted again: right on average, but noisier than it need be."""

    def step(self, t: int, state: State, problem: Problem[Any], backend: Backend) -> Metrics:
        x, y, λ = state.x, state.replicas["y+1"], at(self.penalty, t)
        batch = problem.lower_batch(t, backend.shard)
        for sign in (1, -1):
            backend.backward(partial(problem.lower_loss, x, y), batch, wrt={x: sign * λ / 4})
        return super().step(t, state, problem, backend)


def scheduled(base: type[Any], a: float, c: float, momentum: float | None = None) -> type[Any]:
    """A solver whose schedules have other exponents: a for x, c for z, a - c for the penalty."""

    class Scheduled(base):  # type: ignore[misc]
        @classmethod
        def for_noise(cls, noise: str, *, penalty: float, lr_z: float, xi: float, scale: float) -> Any:
            extra = {} if base is F2SA else {"momentum": Power(1.0, -2 * c if momentum is None else momentum, scale)}
            return base(
                penalty=Power(penalty, a - c, scale),
                lr_z=Power(lr_z, -c, scale),
                lr_x=Power(xi * lr_z / (2 * penalty), -a, scale),
                **extra,
            )

    return Scheduled


def exponents(module: Any, **pairs: tuple[float, float]) -> tuple[tuple[Any, str, Any], ...]:
    """A patch of a solver's table of exponents (a, c), for the noise that is named."""
    return ((module, "EXPONENTS", {**module.EXPONENTS, **pairs}),)


def own_minibatches(step: Any) -> Any:
    """F2SA whose z trains on another minibatch than y."""

    def lower_step(problem: Any, backend: Any, x: Any, y: Any, index: int, **settings: Any) -> Any:
        return step(problem, backend, x, y, index + (10**6 if y.name == "z" else 0), **settings)

    return lower_step


def stale_minibatch(gradients: Any) -> Any:
    """F3SA that evaluates the old point on the old minibatch."""

    def wrong_gradients(t: int, x: Any, y: Any, z: Any, problem: Any, backend: Any) -> Any:
        return gradients(t - (x.name == "x_before"), x, y, z, problem, backend)

    return wrong_gradients


def without_half(p: int) -> dict[int, Fraction]:
    return {-1: Fraction(-1), 1: Fraction(1)} if p == 2 else RIGHT_DIFFERENCE(p)


def wrong_fourth(p: int) -> dict[int, Fraction]:
    """The coefficients of p = 4 with 1/12 replaced by 1/10, and 2/3 by what keeps the difference consistent."""
    c = {2: Fraction(-1, 10), 1: Fraction(7, 10), -1: Fraction(-7, 10), -2: Fraction(1, 10)}
    return c if p == 4 else RIGHT_DIFFERENCE(p)


def first_order(p: int) -> dict[int, Fraction]:
    return RIGHT_DIFFERENCE(1)


RIGHT_DIFFERENCE = f2sa_p.difference


def constant_penalty(K: int) -> Any:
    return dataclasses.replace(finite_horizon_settings(K), penalty=6.0)


def fast_penalty(K: int) -> Any:
    return dataclasses.replace(finite_horizon_settings(K), penalty=2.0 * K ** (2 / 7) / 2)


def horizon_exponents(a: float, c: float) -> tuple[tuple[Any, str, Any], ...]:
    """Steps K^-a of x and K^-c of y and z, and the penalty K^(a - c) that belongs to them, equal to the right ones at K = 600."""

    def settings(K: int) -> Any:
        right, ratio = finite_horizon_settings(600), K / 600
        return StepSizes(
            penalty=right.penalty * ratio ** (a - c),
            lr_y=right.lr_y * ratio**-c,
            lr_z=right.lr_z * ratio**-c,
            lr_x=right.lr_x * ratio**-a,
        )

    return ((finite_horizon, "settings", settings),)


finite_horizon_settings = finite_horizon.settings


def frozen_draw(self: LISA, t: int, blocks: Any, seed: int) -> frozenset[str]:
    return frozenset(blocks.repeated[: self.blocks])


class Untilted(Rounds):
    """y is not drawn to the upper level."""

    def step(self, t: int, state: State, problem: Problem[Any], backend: Backend) -> Metrics:
        metrics = super().step(t, state, problem, backend)
        backend.write(state.replicas["y"], backend.read(state.replicas["z"]))
        return metrics


def negated_signal(self: Distribution, gradient: Any) -> Any:
    return gradient / self.free().detach()


def faded_signal(self: Distribution, gradient: Any) -> Any:
    """The gradient in the logits, which is smaller the smaller a weight is."""
    return -gradient


@dataclass(frozen=True)
class Mutant:
    """What is wrong, the claim that must notice, and how to bring it about: a solver, or patches."""

    name: str
    check: type[Check]
    solver: type[Any] | None = None
    patches: tuple[tuple[Any, str, Any], ...] = ()

    def caught_by(self) -> str | None:
        """The first reading that does not hold, or the error that ends the measurement; None if it passes for right."""
        with ExitStack() as stack:
            for target, name, value in self.patches:
                stack.enter_context(mock.patch.object(target, name, value))
            stack.enter_context(np.errstate(all="ignore"))
            try:
                wrong = (r for r in self.check(quick=True, solver=self.solver).readings() if not r.holds)
                return next((_describe(reading) for reading in wrong), None)
            except (BilevelError, ValueError) as error:
                return f"{type(error).__name__}: {error}"


def _describe(reading: Reading) -> str:
    measured, accepted = reading.measured, reading.accepted
    if measured is not None and accepted is not None and not accepted[0] <= measured <= accepted[1]:
        return f"{reading.quantity}: {measured:.3g}, accepted {accepted[0]:.3g} … {accepted[1]:.3g}"
    return f"{reading.quantity}: deviation {reading.deviation:.1e}, allowed {reading.allowed:.0e}"


MUTANTS = [
    Mutant("x ten times faster than y and z", InteriorWeights, ScaleBiO),
    Mutant("y never sees f", InteriorWeights, Untilted),
    Mutant("signal negated", InteriorWeights, patches=((Distribution, "signal", negated_signal),)),
    Mutant("signal that fades with the weight", InteriorWeights, patches=((Distribution, "signal", faded_signal),)),
    Mutant("g(z) dropped from x's gradient", PenaltyBias, DROPPED),
    Mutant("+ g(z) instead of - g(z)", PenaltyBias, wrong(x_gz=lambda α: α)),
    Mutant("penalty difference negated", PenaltyBias, NEGATED),
    Mutant("α missing where y is trained (g + f)", PenaltyBias, wrong(y_f=lambda α: 1.0)),
    Mutant("α missing in x's gradient", PenaltyBias, wrong(x_gy=lambda α: 1.0, x_gz=lambda α: -1.0)),
    Mutant("α² where y is trained", PenaltyBias, wrong(y_f=lambda α: 1 / α**2)),
    Mutant("α/2 in x's gradient", PenaltyBias, wrong(x_gy=lambda α: α / 2, x_gz=lambda α: -α / 2)),
    Mutant("y minimizes g - f/α", PenaltyBias, wrong(y_f=lambda α: -1 / α)),
    Mutant("y never sees f", PenaltyBias, wrong(y_f=lambda α: 0.0)),
    Mutant("y aliased to z", PenaltyBias, Aliased),
    Mutant("∇_x f missing", PenaltyBias, wrong(x_f=lambda α: 0.0)),
    Mutant("∇_x f at z instead of y", PenaltyBias, wrong(f_at="z")),
    Mutant("value function dropped (∇_x f alone)", PenaltyBias, FREE),
    Mutant("α missing where y is trained", LowerDistance, wrong(y_f=lambda α: 1.0)),
    Mutant("α² where y is trained", LowerDistance, wrong(y_f=lambda α: 1 / α**2)),
    Mutant("y aliased to z", LowerDistance, Aliased),
    Mutant("p = 2 without the ½", HigherOrder, patches=((f2sa_p, "difference", without_half),)),
    Mutant("p silently 1", HigherOrder, patches=((f2sa_p, "difference", first_order),)),
    Mutant("∇_x f at one node only", HigherOrder, OneSided),
    Mutant("g(z) dropped from x's gradient", ImplicitAgreement, DROPPED),
    Mutant("value function dropped", ImplicitAgreement, FREE),
    Mutant("α/2 in x's gradient", ConditionNumber, wrong(x_gy=lambda α: α / 2, x_gz=lambda α: -α / 2)),
    Mutant("value function dropped", FixedPenalty, FREE),
    Mutant("g(z) dropped from x's gradient", FixedPenalty, DROPPED),
    Mutant("lower variables not warm-started", FixedPenalty, ColdStart),
    Mutant("x moves after y and z, not with them", LinearRate, wrong(x_moves="last")),
    Mutant("value function dropped", NonconvexRate, FREE),
    Mutant("g(z) dropped from x's gradient", PBGDRate, wrong(WrongPBGD, x_gz=lambda γ: 0.0)),
    Mutant("γ missing in x's gradient", PBGDRate, wrong(WrongPBGD, x_gy=lambda γ: 1.0, x_gz=lambda γ: -1.0)),
    Mutant("γ/2 in x's gradient", PBGDRate, wrong(WrongPBGD, x_gy=lambda γ: γ / 2, x_gz=lambda γ: -γ / 2)),
    Mutant("√γ where y is trained", PBGDRate, wrong(WrongPBGD, y_f=lambda γ: γ**-0.5)),
    Mutant("γ² where y is trained", PBGDRate, wrong(WrongPBGD, y_f=lambda γ: γ**-2)),
    Mutant("2γ where y is trained", PBGDRate, wrong(WrongPBGD, y_f=lambda γ: 0.5 / γ)),
    Mutant("∇_x f missing", PBGDRate, wrong(WrongPBGD, x_f=lambda γ: 0.0)),
    Mutant("z stays where it starts", PBGDRate, wrong(WrongPBGD, z_moves=False)),
    Mutant("gradient norm without the 2 of the product rule", PBGDRate, HalfProduct),
    Mutant("g(z) dropped from x's gradient", BOMERate, wrong(WrongBOME, x_gz=0.0)),
    Mutant("constant multiplier", BOMERate, wrong(WrongBOME, multiplier=lambda η, f_q, q_q: 5.0)),
    Mutant("no η in the multiplier", BOMERate, wrong(WrongBOME, multiplier=lambda η, f_q, q_q: max(-f_q / q_q, 0.0))),
    Mutant(
        "+<∇f, ∇q> in the multiplier", BOMERate, wrong(WrongBOME, multiplier=lambda η, f_q, q_q: max(η + f_q / q_q, 0.0))
    ),
    Mutant(
        "‖∇q‖ instead of its square", BOMERate, wrong(WrongBOME, multiplier=lambda η, f_q, q_q: max(η - f_q / q_q**0.5, 0.0))
    ),
    Mutant("∇_y f missing", BOMERate, wrong(WrongBOME, y_f=0.0)),
    Mutant("z does not start at y", BOMERate, wrong(WrongBOME, restart=False)),
    Mutant("penalty does not grow", MEHARate, wrong(WrongMEHA, used=lambda c, t: 4.0)),
    Mutant("penalty grows as k^(1/8)", MEHARate, wrong(WrongMEHA, used=lambda c, t: 2.0 * at(c, t) ** 0.5)),
    Mutant("penalty grows as k^(3/10)", MEHARate, wrong(WrongMEHA, used=lambda c, t: 4.0 * (at(c, t) / 4) ** 1.2)),
    Mutant("penalty starts twice as high", MEHARate, wrong(WrongMEHA, used=lambda c, t: 2 * at(c, t))),
    Mutant("g(z) dropped from x's gradient", MEHARate, wrong(WrongMEHA, x_gz=0.0)),
    Mutant("f not divided by c where y is trained", MEHARate, wrong(WrongMEHA, y_f=lambda c: 1.0)),
    Mutant("f not divided by c where x is trained", MEHARate, wrong(WrongMEHA, x_f=lambda c: 1.0)),
    Mutant("proximal term missing in y", MEHARate, wrong(WrongMEHA, y_proximal=0.0)),
    Mutant("proximal term missing in z", MEHARate, wrong(WrongMEHA, z_proximal=0.0)),
    Mutant("proximal term half as strong in both", MEHARate, wrong(WrongMEHA, y_proximal=0.5, z_proximal=0.5)),
    Mutant("penalty does not grow", F2SARate, scheduled(F2SA, 4 / 7, 4 / 7)),
    Mutant("penalty grows as k^(6/7)", F2SARate, scheduled(F2SA, 10 / 7, 4 / 7)),
    Mutant("penalty grows as k^(2/7)", F2SARate, scheduled(F2SA, 6 / 7, 4 / 7)),
    Mutant("noise-free schedule under noise", F2SARate, scheduled(F2SA, 1 / 3, 0.0)),
    Mutant("y and z on different minibatches", F2SARate, patches=((f2sa, "lower_step", own_minibatches(lower_step)),)),
    Mutant("steps k^(-5/8) and k^(-1/2)", F2SARate, patches=exponents(f2sa, both=(5 / 8, 1 / 2))),
    Mutant("steps k^(-2/3) and k^(-1/2)", F2SARate, patches=exponents(f2sa, both=(2 / 3, 1 / 2))),
    Mutant("right penalty with steps k^(-9/14) and k^(-1/2)", F2SARate, patches=exponents(f2sa, both=(9 / 14, 1 / 2))),
    Mutant("noise in f: steps k^(-5/8) and k^(-2/5)", F2SARate, patches=exponents(f2sa, upper=(5 / 8, 2 / 5))),
    Mutant("noise in f: steps k^(-7/12) and k^(-5/12)", F2SARate, patches=exponents(f2sa, upper=(7 / 12, 5 / 12))),
    Mutant("no noise: step k^(-0.3) of x", F2SARate, patches=exponents(f2sa, none=(0.3, 0.0))),
    Mutant("no noise: step k^(-0.36) of x", F2SARate, patches=exponents(f2sa, none=(0.36, 0.0))),
    Mutant("steps k^(-5/8) and k^(-2/5)", F3SARate, patches=exponents(f3sa, both=(5 / 8, 2 / 5))),
    Mutant("steps of F2SA, k^(-5/7) and k^(-4/7)", F3SARate, patches=exponents(f3sa, both=(5 / 7, 4 / 7))),
    Mutant("right penalty with steps k^(-4/7) and k^(-13/35)", F3SARate, patches=exponents(f3sa, both=(4 / 7, 13 / 35))),
    Mutant("noise in f: steps k^(-1/2) and k^(-2/7)", F3SARate, patches=exponents(f3sa, upper=(1 / 2, 2 / 7))),
    Mutant("no noise: step k^(-0.3) of x", F3SARate, patches=exponents(f3sa, none=(0.3, 0.0))),
    Mutant("momentum k^(-1) instead of k^(-4/5)", F3SARate, scheduled(F3SA, 3 / 5, 2 / 5, momentum=-1.0)),
    Mutant("momentum k^(-0.7) instead of k^(-4/5)", F3SARate, scheduled(F3SA, 3 / 5, 2 / 5, momentum=-0.7)),
    Mutant("no momentum", F3SARate, scheduled(F3SA, 3 / 5, 2 / 5, momentum=0.0)),
    Mutant("old point on the old minibatch", F3SARate, patches=((f3sa, "_gradients", stale_minibatch(f3sa._gradients)),)),
    Mutant("penalty independent of the horizon", FiniteHorizon, patches=((finite_horizon, "settings", constant_penalty),)),
    Mutant("penalty grows as K^(2/7)", FiniteHorizon, patches=((finite_horizon, "settings", fast_penalty),)),
    Mutant("penalty K^(1/8), steps K^(-5/8) and K^(-1/2)", FiniteHorizon, patches=horizon_exponents(5 / 8, 1 / 2)),
    Mutant("penalty K^(1/6), steps K^(-2/3) and K^(-1/2)", FiniteHorizon, patches=horizon_exponents(2 / 3, 1 / 2)),
    Mutant("right penalty, steps K^(-9/14) and K^(-1/2)", FiniteHorizon, patches=horizon_exponents(9 / 14, 1 / 2)),
    Mutant("p = 2 without the ½ in the formula", SFOExponent, patches=((sfo_exponent, "difference", without_half),)),
    Mutant("p = 2 without the ½ in the solver", SFOExponent, patches=((f2sa_p, "difference", without_half),)),
    Mutant("p = 4 with 1/10 instead of 1/12", SFOExponent, patches=((f2sa_p, "difference", wrong_fourth),)),
    Mutant("∇_x f at one node only", SFOExponent, OneSided),
    Mutant("a term added and subtracted with independent noise", SFOExponent, Twice),
    Mutant("y and z on different minibatches", SharedMinibatch, wrong(other_batch=1000)),
    Mutant("y and z with different block masks", StableStep, OwnMasks),
    Mutant("y steps half as far as z", StableStep, wrong(y_step=0.5)),
    Mutant("blocks never drawn again", BlockSampling, patches=((LISA, "at", frozen_draw),)),
    Mutant("penalty difference negated", OptimalWeights, NEGATED),
    Mutant("value function dropped", OptimalWeights, FREE),
    Mutant("bias forgotten in the closed form", ClosedForms, patches=((QuadraticForms, "bias", lambda self, x, α: 0 * x),)),
]
