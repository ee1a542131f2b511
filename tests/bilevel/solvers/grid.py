"""Every registered solver with settings that suit a small, well conditioned problem, and what is known of it in closed form.

A solver that is registered is found. It has an entry in `VARIANTS` only where the settings that solvers share do not do, or
where its lower optimum is known.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import Problem, Solver
from bilevel.plugins import Plugins, load_plugins
from bilevel.solvers.f2sa_p import difference
from bilevel.testing.session import configure
from bilevel_problems.quadratic import Quadratic
from bilevel_problems.quadratic_forms import QuadraticForms

PENALTY, GAMMA, LR_Z, LR_X = 20.0, 5.0, 0.6, 0.01
SHARED = {"penalty": PENALTY, "lr_x": LR_X, "lr_z": LR_Z, "lower_steps": 2}

Optimum = Callable[[QuadraticForms, Tensor], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Variant:
    """What is particular to a solver, or to one of its kinds.

    label: what tells it from other kinds of the same solver.
    settings: beside and instead of those that solvers share.
    optimum: where the lower variables go while x is held. None: not known, or dependent on where they come from.
    gradient: the solver's gradient of x over `scale`, at the lower optimum.
    lr_x, steps: with which the true objective falls.
    smooth, strongly_convex: what it asks of a problem.
    repeats: adds nothing but another closed form, so that it is left out of what takes long.
    """

    label: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    optimum: Optimum | None = None
    gradient: Callable[[QuadraticForms, Tensor], Tensor] | None = None
    scale: float = 1.0
    lr_x: float = 0.2
    steps: int = 25
    smooth: bool = False
    strongly_convex: bool = False
    repeats: bool = False


@dataclass(frozen=True)
class Case:
    """A registered solver in one of its kinds."""

    registered: str
    solver: Solver[Any]
    known: Variant

    @property
    def name(self) -> str:
        return f"{self.registered}, {self.known.label}" if self.known.label else self.registered

    @property
    def second_order(self) -> bool:
        return self.solver.workload().products > 0

    @property
    def param(self) -> Any:
        return pytest.param(self, id=self.name)


def resolvent(P: Tensor, forms: QuadraticForms, x: Tensor) -> Tensor:
    return torch.linalg.solve(PENALTY * P + forms.B, forms.slope(x))


def penalized(P: Callable[[QuadraticForms], Tensor]) -> Callable[[QuadraticForms, Tensor], Tensor]:
    return lambda forms, x: forms.grad_phi(x) - resolvent(P(forms), forms, x) @ forms.S


def value_gap(forms: QuadraticForms, x: Tensor) -> dict[str, Tensor]:
    return {"y": forms.penalized_solution(x, PENALTY), "z": forms.lower_solution(x)}


def gradient_norm_matrix(forms: QuadraticForms) -> Tensor:
    return 2 * forms.A @ forms.A


def envelope_matrix(forms: QuadraticForms) -> Tensor:
    eye = torch.eye(len(forms.A), dtype=torch.float64)
    return GAMMA * forms.A @ forms.A @ torch.linalg.inv(eye + GAMMA * forms.A)


def envelope(forms: QuadraticForms, x: Tensor) -> dict[str, Tensor]:
    """y, and z = argmin g(x, z) + ‖z - y‖²/(2γ)."""
    y = forms.lower_solution(x) - resolvent(envelope_matrix(forms), forms, x)
    eye = torch.eye(len(forms.A), dtype=torch.float64)
    return {"y": y, "z": torch.linalg.solve(GAMMA * forms.A + eye, y - GAMMA * (forms.C @ x + forms.b))}


def path(p: int) -> Variant:
    def optimum(forms: QuadraticForms, x: Tensor) -> dict[str, Tensor]:
        return {
            f"y{j:+d}": forms.penalized_solution(x, PENALTY / j) if j else forms.lower_solution(x) for j in difference(p)
        }

    def gradient(forms: QuadraticForms, x: Tensor) -> Tensor:
        weights = {j: float(c) for j, c in difference(p).items()}
        return forms.grad_phi(x) + forms.difference_bias(x, PENALTY, weights)

    needs = p > 1
    return Variant(f"p={p}", {"p": p}, optimum, gradient, smooth=needs, strongly_convex=needs, repeats=p != 2)


GAP = penalized(lambda forms: forms.A)
"""The penalty is ½ e'Pe around y*(x), P a function of the forms; its gradient is ∇Φ - S'(αP + B)⁻¹ s."""
VARIANTS: Mapping[str, Sequence[Variant]] = {
    "scalebio": [Variant(settings={"lower_steps": 1, "optimizer_y": None}, optimum=value_gap, gradient=GAP)],
    "f2sa": [Variant(optimum=value_gap, gradient=GAP)],
    "f3sa": [Variant(settings={"lr_y": LR_Z, "momentum": 0.3}, optimum=value_gap, gradient=GAP)],
    "f2ba": [Variant(settings={"lower_steps": 3}, optimum=value_gap, gradient=GAP)],
    "f2sa-p": [path(p) for p in (1, 2, 3, 4)],
    "pbgd": [
        Variant(optimum=value_gap, gradient=GAP, lr_x=0.02),
        Variant(
            "gradient norm",
            {"kind": "gradient-norm", "lr_y": 0.8},
            lambda forms, x: {"y": forms.lower_solution(x) - resolvent(gradient_norm_matrix(forms), forms, x)},
            penalized(gradient_norm_matrix),
            lr_x=0.02,
            steps=100,
            smooth=True,
        ),
    ],
    "meha": [
        Variant(
            settings={"gamma": GAMMA},
            optimum=envelope,
            gradient=penalized(envelope_matrix),
            scale=1 / PENALTY,
            lr_x=0.02 * PENALTY,
        )
    ],
    "bome": [Variant(settings={"lower_steps": 3})],
    "aid": [
        Variant(
            settings={"cg_tolerance": 1e-12},
            optimum=lambda forms, x: {"z": forms.lower_solution(x)},
            gradient=lambda forms, x: forms.grad_phi(x),
            smooth=True,
            strongly_convex=True,
        )
    ],
    "soba": [
        Variant(
            optimum=lambda forms, x: {
                "z": forms.lower_solution(x),
                "v": -torch.linalg.solve(forms.A, forms.slope(x)),
            },
            gradient=lambda forms, x: forms.grad_phi(x),
            lr_x=0.1,
            smooth=True,
            strongly_convex=True,
        )
    ],
}


def first_party() -> Plugins:
    """What else is installed on a developer's machine must not change a test."""
    return load_plugins(point for point in entry_points(group="bilevel") if point.name.startswith("bilevel"))


def find_cases(plugins: Plugins) -> list[Case]:
    """All registered solvers that take any problem and move x."""
    return [
        Case(name, configure(solver, **{**SHARED, **variant.settings}), variant)
        for name, solver in ((name, part.load()) for name, part in sorted(plugins.parts["solvers"].items()))
        if solver.takes is Problem and "lr_x" in {f.name for f in dataclasses.fields(solver)}
        for variant in VARIANTS.get(name, [Variant()])
    ]


CASES = {case.name: case for case in find_cases(first_party())}


def grid(*, without: Callable[[Case], bool] = lambda case: False) -> Any:
    """Parametrize a test by `case`."""
    return pytest.mark.parametrize("case", [case.param for case in CASES.values() if not without(case)])


def small(**settings: Any) -> Quadratic:
    """Two upper and four lower coordinates; no coefficient is zero, as a zero would hide errors."""
    return Quadratic(m=2, n=4, kappa=3.0, **settings)
