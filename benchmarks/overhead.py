"""CPU time of an upper step over that of a bare PyTorch loop of the same algorithm, on small problems: that is, overhead.

The bare loops are below: the data are one batch, the variables are leaf tensors, each update is a line, and nothing is
checked, recorded or written. Ours is `fit`, with a run directory unless `--in-memory` is given. Both run in one process, in
turn (bare, ours, bare, ours, ...), so that a change in the machine's speed hits both; printed is the median over the rounds.
The two must arrive at the same numbers, or the benchmark fails.

Usage: OMP_NUM_THREADS=1 python benchmarks/overhead.py [--rounds 5] [--solvers NAME ...] [--problems NAME ...]
       [--lower-steps 10 1] [--in-memory] [--json FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bilevel import AID, BOME, F2BA, F2SA, F3SA, MEHA, PBGD, SGD, SOBA, F2SAp, Problem, ScaleBiO, Solver, fit
from bilevel.solvers.descent import Descent
from bilevel_backends.torch_backend import TorchBackend
from bilevel_problems.hyper_cleaning import CLASSES, HyperCleaning
from bilevel_problems.logistic_regularization import LogisticRegularization
from bilevel_problems.quadratic import Quadratic

PENALTY, LR_Z, LR_X = 10.0, 0.1, 0.01
CG_STEPS, CG_TOLERANCE = 100, 1e-5
WARM = 3  # steps of each run that are not timed
AGREE = 1e-9  # relative; everything is in float64, and the two sum in different orders

Loss = Callable[[Tensor, Sequence[Tensor]], Tensor]
Step = Iterator[Tensor]


class MLP(nn.Module):
    """64 pixels, 256 hidden units, 10 classes; it starts from the same numbers every time."""

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=random, dtype=torch.float64) / shape[-1] ** 0.5)

        self.first, self.bias, self.last = normal(256, 64), normal(256), normal(CLASSES, 256)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The scores and ½‖W‖² of the last layer."""
        hidden = torch.tanh(F.linear(features, self.first, self.bias))
        return F.linear(hidden, self.last), 0.5 * (self.last**2).sum()


@dataclass
class MLPCleaning(HyperCleaning):
    """Weights for 128 rows, from an MLP."""

    rows: int = 128
    validation_rows: int = 128

    def lower(self) -> nn.Module:
        """The MLP."""
        return MLP()


@dataclass(frozen=True)
class Bare:
    """A problem as plain functions of x and a list of tensors y, and where these start."""

    f: Loss
    g: Loss
    x: Tensor
    y: list[Tensor]


@dataclass(frozen=True)
class Case:
    """A problem of ours, and the same in bare PyTorch."""

    problem: Problem[Any]
    bare: Callable[[Any], Bare]
    convex: bool = True

    @cached_property
    def functions(self) -> Bare:
        """The bare problem."""
        return self.bare(self.problem)


def logistic(problem: LogisticRegularization) -> Bare:
    """f and g of `LogisticRegularization`."""
    a, b = problem.training.features, problem.training.targets
    v, c = problem.validation.features, problem.validation.targets

    def f(x: Tensor, y: Sequence[Tensor]) -> Tensor:
        return F.softplus(-c * (v @ y[0])).mean()

    def g(x: Tensor, y: Sequence[Tensor]) -> Tensor:
        return F.softplus(-b * (a @ y[0])).mean() + 0.5 * (torch.exp(x) * y[0] ** 2).sum()

    return Bare(f, g, *_start(problem))


def cleaning(problem: HyperCleaning) -> Bare:
    """f and g of `HyperCleaning`, for a linear classifier and for the MLP."""
    a, b = problem.training.features, problem.training.targets
    v, c = problem.validation.features, problem.validation.targets

    def scores(y: Sequence[Tensor], features: Tensor) -> Tensor:
        if len(y) == 2:
            return F.linear(features, y[0], y[1])
        return F.linear(torch.tanh(F.linear(features, y[0], y[1])), y[2])

    def f(x: Tensor, y: Sequence[Tensor]) -> Tensor:
        return F.cross_entropy(scores(y, v), c)

    def g(x: Tensor, y: Sequence[Tensor]) -> Tensor:
        losses = F.cross_entropy(scores(y, a), b, reduction="none")
        weights = y[0] if len(y) == 2 else y[2]
        return (torch.sigmoid(x) * losses).mean() + 0.5 * problem.ridge * (weights**2).sum()

    return Bare(f, g, *_start(problem))


def quadratic(problem: Quadratic) -> Bare:
    """f and g of `Quadratic`."""
    q = problem.forms

    def f(x: Tensor, y: Sequence[Tensor]) -> Tensor:
        r = y[0] - q.t
        return 0.5 * r @ (q.B @ r) + x @ (q.E @ y[0] + 0.5 * (q.D @ x) + q.d)

    def g(x: Tensor, y: Sequence[Tensor]) -> Tensor:
        return y[0] @ (0.5 * (q.A @ y[0]) + q.C @ x + q.b) + x @ (0.5 * (q.Q @ x) + q.q)

    return Bare(f, g, *_start(problem))


def _start(problem: Problem[Any]) -> tuple[Tensor, list[Tensor]]:
    (x,), y = problem.upper().parameters(), problem.lower().parameters()
    return x.detach(), [p.detach() for p in y]


CASES: Mapping[str, Case] = {
    "logreg": Case(LogisticRegularization(d=30), logistic),
    "cleaning": Case(HyperCleaning(), cleaning),
    "quadratic": Case(Quadratic(m=10, n=200), quadratic),
    "MLP": Case(MLPCleaning(), cleaning, convex=False),
}


def leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies that get gradients."""
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def gradient(loss: Tensor, inputs: Sequence[Tensor], **options: Any) -> tuple[Tensor, ...]:
    """The gradients; zero where the loss does not depend on an input."""
    return torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True, **options)


def descend(variables: Sequence[Tensor], gradients: Sequence[Tensor], lr: float) -> None:
    """A step of gradient descent."""
    with torch.no_grad():
        for variable, slope in zip(variables, gradients, strict=True):
            variable.sub_(slope, alpha=lr)


def bare_f2sa(p: Bare, T: int) -> Step:
    f, g, (x,), y, z = p.f, p.g, leaves([p.x]), leaves(p.y), leaves(p.y)
    while True:
        for _ in range(T):
            descend(z, gradient(g(x, z), z), LR_Z)
            descend(y, gradient(g(x, y) + f(x, y) / PENALTY, y), LR_Z / 2)
        descend([x], gradient(f(x, y) + PENALTY * (g(x, y) - g(x, z)), [x]), LR_X)
        yield x


def bare_f2sa_p(p: Bare, T: int) -> Step:
    f, g, (x,), (u, w) = p.f, p.g, leaves([p.x]), [leaves(p.y) for _ in range(2)]
    while True:
        for y, j in ((u, -1), (w, 1)):
            for _ in range(T):
                descend(y, gradient(g(x, y) + j / PENALTY * f(x, y), y), LR_Z)
        Φ = 0.5 * (f(x, w) + f(x, u) + PENALTY * (g(x, w) - g(x, u)))
        descend([x], gradient(Φ, [x]), LR_X)
        yield x


def bare_f3sa(p: Bare, T: int) -> Step:
    f, g, (x,), y, z = p.f, p.g, leaves([p.x]), leaves(p.y), leaves(p.y)
    n = len(y)

    def gradients(x: Tensor, y: list[Tensor], z: list[Tensor]) -> list[Tensor]:
        of_f, of_y, of_z = gradient(f(x, y), [x, *y]), gradient(g(x, y), [x, *y]), gradient(g(x, z), [x, *z])
        return [of_f[0], of_y[0] - of_z[0], *of_f[1:], *of_y[1:], *of_z[1:]]

    h, before = gradients(x, y, z), ([x], y, z)
    for t in itertools.count():
        if t:
            new, old = gradients(x, y, z), gradients(before[0][0], *before[1:])
            h = [a + 0.7 * (b - c) for a, b, c in zip(new, h, old, strict=True)]
        before = leaves([x]), leaves(y), leaves(z)
        descend(z, h[2 + 2 * n :], LR_Z)
        descend(y, [b + a / PENALTY for a, b in zip(h[2 : 2 + n], h[2 + n :], strict=False)], LR_Z / 2)
        descend([x], [h[0] + PENALTY * h[1]], LR_X)
        yield x


def bare_pbgd(p: Bare, T: int) -> Step:
    f, g, (x,), y, z = p.f, p.g, leaves([p.x]), leaves(p.y), leaves(p.y)
    while True:
        for _ in range(T):
            descend(z, gradient(g(x, z), z), LR_Z)
        dx, *dy = gradient(g(x, y) - g(x, z) + f(x, y) / PENALTY, [x, *y])
        descend(y, dy, LR_Z)
        descend([x], [PENALTY * dx], LR_X)
        yield x


def bare_pbgd_norm(p: Bare, T: int) -> Step:
    f, g, (x,), y = p.f, p.g, leaves([p.x]), leaves(p.y)
    while True:
        v = gradient(g(x, y), y)  # of one minibatch, and the product with that of another: so is the method with minibatches
        slopes = gradient(g(x, y), y, create_graph=True)
        product = sum((2 * (a * b).sum() for a, b in zip(v, slopes, strict=True)), f(x, y) / PENALTY)
        dx, *dy = gradient(product, [x, *y])
        descend(y, dy, LR_Z)
        descend([x], [PENALTY * dx], LR_X)
        yield x


def bare_scalebio(p: Bare, T: int) -> Step:
    f, g, (x,), y, z = p.f, p.g, leaves([p.x]), leaves(p.y), leaves(p.y)
    while True:
        total = torch.zeros_like(x)
        for _ in range(T):
            of_z, *dz = gradient(g(x, z), [x, *z])
            of_y, *dy = gradient(g(x, y) + f(x, y) / PENALTY, [x, *y])
            descend(z, dz, LR_Z)
            descend(y, dy, LR_Z)
            total.add_(of_y - of_z, alpha=PENALTY / T)
        descend([x], [total], LR_X)
        yield x


def bare_aid(p: Bare, T: int) -> Step:
    f, g, (x,), z = p.f, p.g, leaves([p.x]), leaves(p.y)
    while True:
        for _ in range(T):
            descend(z, gradient(g(x, z), z), LR_Z)
        of_x, *b = gradient(f(x, z), [x, *z])
        slopes = gradient(g(x, z), z, create_graph=True)

        def hessian_times(v: Sequence[Tensor], slopes: Sequence[Tensor] = slopes) -> tuple[Tensor, ...]:
            return torch.autograd.grad(slopes, z, v, retain_graph=True)

        v = bare_conjugate_gradients(hessian_times, b)
        mixed = torch.autograd.grad(slopes, [x], v, allow_unused=True, materialize_grads=True)
        descend([x], [of_x - mixed[0]], LR_X)
        yield x


def bare_conjugate_gradients(times: Callable[[Sequence[Tensor]], Sequence[Tensor]], b: list[Tensor]) -> list[Tensor]:
    """As in `bilevel.solvers.aid`, with the residual at the end."""

    def dot(u: Sequence[Tensor], w: Sequence[Tensor]) -> float:
        return float(sum((s * t).sum() for s, t in zip(u, w, strict=True)))

    def add(u: Sequence[Tensor], a: float, w: Sequence[Tensor]) -> list[Tensor]:
        return [s + a * t for s, t in zip(u, w, strict=True)]

    v, r, direction = [torch.zeros_like(part) for part in b], b, b
    bb = rr = dot(b, b)
    for _ in range(CG_STEPS) if bb else ():
        Hp = times(direction)
        a = rr / dot(direction, Hp)
        v, r = add(v, a, direction), add(r, -a, Hp)
        rr, previous = dot(r, r), rr
        if rr <= (CG_TOLERANCE / 2) ** 2 * bb:
            break
        direction = add(r, rr / previous, direction)
    left = add(b, -1.0, times(v))
    assert dot(left, left) <= CG_TOLERANCE**2 * bb
    return v


def bare_soba(p: Bare, T: int) -> Step:
    f, g, (x,), z = p.f, p.g, leaves([p.x]), leaves(p.y)
    v = [torch.zeros_like(part) for part in z]
    while True:
        slopes = gradient(g(x, z), z, create_graph=True)
        products = torch.autograd.grad(slopes, [x, *z], v, allow_unused=True, materialize_grads=True)
        dx, *dv = [a + b for a, b in zip(products, gradient(f(x, z), [x, *z]), strict=True)]
        descend(z, slopes, LR_Z)
        descend(v, dv, LR_Z)
        descend([x], [dx], LR_X)
        yield x


def bare_bome(p: Bare, T: int) -> Step:
    f, g, (x,), y, η = p.f, p.g, leaves([p.x]), leaves(p.y), 0.5
    while True:
        z = leaves(y)
        for _ in range(T):
            descend(z, gradient(g(x, z), z), LR_Z)
        grad_q = gradient(g(x, y) - g(x, z), [x, *y])
        grad_f = gradient(f(x, y), [x, *y])
        f_q = float(sum((a * b).sum() for a, b in zip(grad_f, grad_q, strict=True)))
        q_q = float(sum((b * b).sum() for b in grad_q))
        λ = max(η - f_q / q_q, 0.0) if q_q > 0 else 0.0
        descend([x, *y], [a + λ * b for a, b in zip(grad_f, grad_q, strict=True)], LR_X)
        yield x


def bare_meha(p: Bare, T: int) -> Step:
    f, g, (x,), y, z = p.f, p.g, leaves([p.x]), leaves(p.y), leaves(p.y)
    while True:
        descend(z, [d + (c - b) for d, b, c in zip(gradient(g(x, z), z), y, z, strict=True)], LR_Z)
        dx, *dy = gradient(f(x, y) / PENALTY + g(x, y) - g(x, z), [x, *y])
        descend(y, [d - (b - c) for d, b, c in zip(dy, y, z, strict=True)], LR_Z)
        descend([x], [dx], LR_X)
        yield x


def bare_descent(p: Bare, T: int) -> Step:
    x, z = p.x, leaves(p.y)
    while True:
        loss = p.g(x, z)
        descend(z, gradient(loss, z), LR_Z)
        yield loss.detach()


@dataclass(frozen=True)
class Method:
    """A solver with T lower steps, and the bare loop that does the same."""

    solver: Callable[[int], Solver[Any]]
    bare: Callable[[Bare, int], Step]
    single: bool = False
    convex: bool = False


_SHARED: Mapping[str, Any] = {"lr_x": LR_X, "lr_z": LR_Z}
_PENALIZED: Mapping[str, Any] = {**_SHARED, "penalty": PENALTY}
_SGD: Mapping[str, Any] = {"optimizer_x": SGD(), "optimizer_z": SGD()}
METHODS: Mapping[str, Method] = {
    "f2sa": Method(lambda T: F2SA(**_PENALIZED, lower_steps=T), bare_f2sa),
    "f2ba": Method(lambda T: F2BA(**_PENALIZED, lower_steps=T), bare_f2sa),
    "f2sa-p": Method(lambda T: F2SAp(**_PENALIZED, lower_steps=T), bare_f2sa_p),
    "pbgd": Method(lambda T: PBGD(**_PENALIZED, lower_steps=T), bare_pbgd),
    "scalebio": Method(lambda T: ScaleBiO(**_PENALIZED, **_SGD, lower_steps=T, warmup=0), bare_scalebio),
    "aid": Method(
        lambda T: AID(**_SHARED, cg_steps=CG_STEPS, cg_tolerance=CG_TOLERANCE, lower_steps=T), bare_aid, convex=True
    ),
    "soba": Method(lambda T: SOBA(**_SHARED), bare_soba, single=True, convex=True),
    "bome": Method(lambda T: BOME(**_SHARED, lower_steps=T), bare_bome),
    "meha": Method(lambda T: MEHA(**_PENALIZED), bare_meha, single=True),
    "f3sa": Method(lambda T: F3SA(**_PENALIZED, momentum=0.3), bare_f3sa, single=True),
    "pbgd, gradient norm": Method(lambda T: PBGD(**_PENALIZED, kind="gradient-norm"), bare_pbgd_norm, single=True),
    "descent": Method(lambda T: Descent(lr=LR_Z, optimizer=SGD(), evaluate_every=10**9), bare_descent, single=True),
}


class Clock:
    """Remembers the CPU time at the end of every step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def bilevel_run_start(self, *, run: Any) -> None:
        """Nothing."""

    def bilevel_step_end(self, *, run: Any, record: Any) -> None:
        """Note the time."""
        self.ends.append(time.process_time())

    def bilevel_run_end(self, *, run: Any, error: BaseException | None) -> None:
        """Nothing."""

    @property
    def step(self) -> float:
        """CPU seconds of a step."""
        return (self.ends[-1] - self.ends[WARM - 1]) / (len(self.ends) - WARM)


def run_bare(method: Method, case: Case, T: int, steps: int) -> tuple[float, Tensor]:
    """Seconds of a step, and where the bare loop arrives."""
    clock, loop = Clock(), method.bare(case.functions, T)
    for _ in range(steps):
        arrived = next(loop)
        clock.bilevel_step_end(run=None, record=None)
    return clock.step, arrived.detach()


def run_ours(method: Method, case: Case, T: int, steps: int, output: Path | None) -> tuple[float, Tensor]:
    """Seconds of a step, and where `fit` arrives."""
    clock = Clock()
    backend = TorchBackend(device="cpu")
    result = fit(case.problem, method.solver(T), backend, steps=steps, output=output, observer=clock)
    if method.bare is bare_descent:
        return clock.step, torch.tensor(result.history[-1].metrics["lower_loss"], dtype=torch.float64)
    return clock.step, next(iter(result.x.values()))


def compare(method: Method, case: Case, T: int, rounds: int, *, in_memory: bool) -> tuple[float, float]:
    """The medians of the seconds of a step, bare and ours. Raises `AssertionError` if they arrive at different numbers."""
    first, _ = run_bare(method, case, T, WARM + 3)
    steps = WARM + min(max(int(0.15 / first), 5), 400)
    times: list[tuple[float, float]] = []
    for _ in range(rounds):
        bare, there = run_bare(method, case, T, steps)
        with nullcontext(None) if in_memory else tempfile.TemporaryDirectory() as directory:
            ours, here = run_ours(method, case, T, steps, Path(directory, "run") if directory else None)
        torch.testing.assert_close(here, there, rtol=AGREE, atol=AGREE)
        times.append((bare, ours))
    return median(bare for bare, _ in times), median(ours for _, ours in times)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--solvers", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--problems", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--lower-steps", nargs="+", type=int, default=[10, 1])
    parser.add_argument("--in-memory", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, dict[str, float]]] = {}
    table = Table("solver", "lower steps", *options.problems, title="CPU time of an upper step: ours / bare (bare, ms)")
    for name in options.solvers:
        method = METHODS[name]
        for T in [1] if method.single else options.lower_steps:
            row = []
            for problem in options.problems:
                case = CASES[problem]
                if method.convex and not case.convex:
                    row.append("–")
                    continue
                bare, ours = compare(method, case, T, options.rounds, in_memory=options.in_memory)
                found.setdefault(f"{name}, {T}", {})[problem] = {"bare": bare, "ours": ours, "ratio": ours / bare}
                row.append(f"{ours / bare:.2f} ({1e3 * bare:.2f})")
            table.add_row(name, str(T), *row)
    console = Console(width=120)
    console.print(table)
    console.print(f"load {os.getloadavg()[0]:.1f}, {'in memory' if options.in_memory else 'with a run directory'}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
