"""CPU time of other packages and of this one on the same problems: of a step, and until most of the gap in Φ is closed.

The problems are those of `benchmarks/overhead.py`: logistic regression with a penalty for each of 30 coordinates,
hyper-cleaning (500 weights, 650 numbers), and a quadratic with 200 lower coordinates; everything in float64, in one thread,
with all data in one batch. Each package solves them as its own documentation does, in an environment of its own
(`make bench-peers`), and gives the x of every step with the CPU time until then; Φ is evaluated here, at a lower level that
is solved accurately. The gap is that between Φ at the start and the least Φ that L-BFGS finds; 3 % of it may be left, and
10 % in the logistic regression, whose minimum lies at penalties of 10^15.

Each method runs with ten settings, which are stated below. The one that closes the gap in the least CPU time is run
again in every round, three times, in turn with those of the other methods; printed are medians. What a process imports,
or JAX compiles, is not counted; building the package's objects is. Before that, the first step of x is compared with ∇Φ,
with a lower level and a linear system that are solved well, so that a method that computes something else is known.

Usage: python benchmarks/peers/compare.py ENVIRONMENTS [--rounds 3] [--problems NAME ...] [--methods NAME ...] [--json FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from reference import Array, Reference, first_below
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bilevel_problems.hyper_cleaning import CLASSES, HyperCleaning
from bilevel_problems.logistic_regularization import LogisticRegularization
from bilevel_problems.quadratic import Quadratic

HERE = Path(__file__).parent
REPEATS = 3  # in each round, as a process takes seconds to start
Settings = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A problem: what the scripts are given, and its true objective.

    lr_x: the largest step size of x, for every method alike, since all of them step along (an approximation of) ∇Φ.
    lr_z: the step size of the lower level: close to the largest that is stable where the path leads.
    goal: the part of the gap that may be left.
    steps: the most that a method takes; a single loop takes three times as many.
    """

    data: Mapping[str, Array]
    reference: Reference
    lr_x: float
    lr_z: float
    goal: float
    steps: int


def logreg() -> Case:
    """See `LogisticRegularization`."""
    problem = LogisticRegularization(d=30)
    a, b, v, c = (t for table in (problem.training, problem.validation) for t in (table.features, table.targets))

    def f(x: Tensor, y: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-c * (v @ y)).mean()

    def g(x: Tensor, y: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-b * (a @ y)).mean() + 0.5 * (torch.exp(x) * y**2).sum()

    data = {"a": a, "b": b, "v": v, "c": c, "x": torch.full((30,), problem.start).double(), "y": torch.zeros(30).double()}
    return _case(data, f, g, lr_x=TOP["logreg"], lr_z=LR_Z["logreg"], goal=0.1, steps=300)


def cleaning() -> Case:
    """See `HyperCleaning`; the last column of y is the bias."""
    problem = HyperCleaning()
    a, b, v, c = (t for table in (problem.training, problem.validation) for t in (table.features, table.targets))

    def losses(y: Tensor, features: Tensor, labels: Tensor) -> Tensor:
        scores = torch.nn.functional.linear(features, y[:, :-1], y[:, -1])
        return torch.nn.functional.cross_entropy(scores, labels, reduction="none")

    def f(x: Tensor, y: Tensor) -> Tensor:
        return losses(y, v, c).mean()

    def g(x: Tensor, y: Tensor) -> Tensor:
        return (torch.sigmoid(x) * losses(y, a, b)).mean() + 0.5 * problem.ridge * (y[:, :-1] ** 2).sum()

    start = {"x": torch.zeros(problem.rows).double(), "y": torch.zeros(CLASSES, a.shape[1] + 1).double()}
    data = {"a": a, "b": b, "v": v, "c": c, **start, "ridge": torch.tensor(problem.ridge).double()}
    return _case(data, f, g, lr_x=TOP["cleaning"], lr_z=LR_Z["cleaning"], goal=0.03, steps=100)


def quadratic() -> Case:
    """See `Quadratic`."""
    problem = Quadratic(m=10, n=200)
    q = problem.forms
    data = {name: getattr(q, name) for name in "ABCDEbdt"} | {"x": problem.start_x, "y": problem.start_y}
    return _case(data, q.f, q.g, lr_x=TOP["quadratic"], lr_z=LR_Z["quadratic"], goal=0.03, steps=100)


def _case(data: Mapping[str, Tensor], f: Any, g: Any, **steps: Any) -> Case:
    arrays = {name: value.numpy() for name, value in data.items()}
    return Case(arrays, Reference(f, g, arrays["x"], arrays["y"]), **steps)


CASES = {"logreg": logreg, "cleaning": cleaning, "quadratic": quadratic}
TITLES = {"logreg": "logistic regression, 30", "cleaning": "hyper-cleaning, 500 × 650", "quadratic": "quadratic, n = 200"}
TOP = {"logreg": 64.0, "cleaning": 3200.0, "quadratic": 0.16}
"""The largest step size of x. The others are a half, a quarter, an eighth and a sixteenth of it."""
LR_Z = {"logreg": 0.1, "cleaning": 1.0, "quadratic": 1.0}


@dataclass(frozen=True)
class Method:
    """A method of a package.

    environment: the folder of its environment; None: that of this project.
    kind: what it has two values of, beside the five of lr_x: see `settings`.
    """

    script: str
    environment: str | None
    solver: str
    kind: str

    def settings(self, case: Case) -> Iterator[Settings]:
        """Ten settings: five of lr_x; and two of the work in a step, of the step size of z and v, or of the penalty."""
        for lr_x, second in itertools.product([case.lr_x / 2**k for k in range(5)], (0, 1)):
            own: Settings = {
                "implicit": {"lr_z": case.lr_z, **({"T": 10, "products": 10}, {"T": 3, "products": 3})[second]},
                "single loop": {"lr_z": (case.lr_z, case.lr_z / 2)[second]},
                "penalty": {"lr_z": case.lr_z, "T": 10, "penalty": (10.0, 100.0)[second]},
            }[self.kind]
            steps = case.steps * (3 if self.kind == "single loop" else 1)
            yield {"solver": self.solver, "lr_x": lr_x, "steps": steps, **own}


METHODS = {
    "bilevel, soba": Method("run_bilevel.py", None, "soba", "single loop"),
    "bilevel, aid": Method("run_bilevel.py", None, "aid", "implicit"),
    "bilevel, f2sa": Method("run_bilevel.py", None, "f2sa", "penalty"),
    "betty-ml, cg": Method("run_betty.py", "betty-ml", "cg", "implicit"),
    "betty-ml, neumann": Method("run_betty.py", "betty-ml", "neumann", "implicit"),
    "torchopt, implicit": Method("run_torchopt.py", "torchopt", "cg", "implicit"),
    "boat-torch, cg": Method("run_boat.py", "boat-torch", "cg", "implicit"),
    "jaxopt, implicit": Method("run_jaxopt.py", "jaxopt", "cg", "implicit"),
    "f2sa, a jitted loop": Method("run_jaxopt.py", "jaxopt", "f2sa", "penalty"),
}


def run(
    method: Method, problem: str, data: Path, settings: Sequence[Settings], environments: Path
) -> list[tuple[Array, Array]]:
    """The iterates of x and the CPU seconds until each of them, for each setting. What a script complains of is printed."""
    python = sys.executable if method.environment is None else str(environments / method.environment / "bin" / "python")
    chosen, result = data.with_name("settings.json"), data.with_name("result.npz")
    chosen.write_text(json.dumps(settings))
    command = [python, str(HERE / method.script), problem, str(data), str(chosen), str(result)]
    limits = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    limits["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    done = subprocess.run(command, env={**os.environ, **limits}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{method.script} failed on {problem}:\n{done.stderr[-2000:]}")
    with np.load(result) as file:
        return [(file[f"x{k}"], file[f"seconds{k}"]) for k in range(len(settings))]


@dataclass(frozen=True)
class Best:
    """The best settings of a method on a problem: `steps` of them end below the goal."""

    settings: Settings
    seconds: float


def tune(method: Method, problem: str, case: Case, goal: float, data: Path, environments: Path) -> Best | None:
    """The settings that are below the goal in the least CPU time; None if none is."""
    settings = list(method.settings(case))
    best: Best | None = None
    for chosen, (iterates, seconds) in zip(settings, run(method, problem, data, settings, environments), strict=True):
        reached = first_below(case.reference.phi, list(iterates), goal) if len(iterates) else None
        if reached is not None and (best is None or seconds[reached] < best.seconds):
            best = Best({**chosen, "steps": reached + 1}, float(seconds[reached]))
    return best


def error_of_gradient(method: Method, problem: str, case: Case, data: Path, environments: Path) -> float:
    """The relative error of the first step of x as a step along ∇Φ, with far more work in it than a run would do.

    1e-3 is what a penalty leaves. What is of another order is wrong.
    """
    small, x = 1e-6, case.data["x"]
    work = {"T": 400, "products": 400 if method.solver == "neumann" else 20, "penalty": 1e4}
    settings = {"solver": method.solver, "lr_x": small, "lr_z": case.lr_z, "steps": 1, **work}
    ((iterates, _),) = run(method, problem, data, [settings], environments)
    true = case.reference.gradient(x)
    return float(np.linalg.norm((x - iterates[0]) / small - true) / np.linalg.norm(true))


def lines(script: str) -> int:
    """Lines of code between the marks, which are what a user writes for the logistic regression."""
    counted, inside = 0, False
    for line in (text.strip() for text in (HERE / script).read_text().splitlines()):
        if line in ("# user code", "# end"):
            inside = line == "# user code"
        elif inside and line and not line.startswith(("#", '"""')):
            counted += 1
    return counted


def main() -> None:
    """Tune, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environments", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--problems", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, Any]] = {name: {} for name in options.methods}
    with tempfile.TemporaryDirectory() as directory:
        for problem in options.problems:
            case, data = CASES[problem](), Path(directory, "data.npz")
            np.savez(data, **dict[str, Any](case.data))
            start, least = case.reference.phi(case.data["x"]), case.reference.least()
            goal = least + case.goal * (start - least)
            print(f"{problem}: Φ {start:.4f} at the start, {least:.4f} at best, {goal:.4f} to be reached", flush=True)
            for name in options.methods:
                if METHODS[name].kind != "single loop":  # which has no gradient of x before z and v have converged
                    wrong = error_of_gradient(METHODS[name], problem, case, data, options.environments)
                    print(f"  {name}: relative error of ∇Φ {wrong:.0e}", flush=True)
                    found[name].setdefault("errors", {})[problem] = wrong
            best = {name: tune(METHODS[name], problem, case, goal, data, options.environments) for name in options.methods}
            times: dict[str, list[float]] = {name: [] for name in best}
            for _ in range(options.rounds):
                for name, chosen in best.items():
                    if chosen is not None:
                        again = run(METHODS[name], problem, data, REPEATS * [chosen.settings], options.environments)
                        times[name] += [float(seconds[-1]) for _, seconds in again]
            for name, chosen in best.items():
                if chosen is not None:
                    total = median(times[name])
                    per_step = total / chosen.settings["steps"]
                    found[name][problem] = {"seconds": total, "seconds_a_step": per_step, "settings": chosen.settings}
    _print(found, options.problems)
    if options.json:
        options.json.write_text(json.dumps({"load": os.getloadavg()[0], "methods": found}, indent=1))


def _print(found: Mapping[str, Mapping[str, Any]], problems: Sequence[str]) -> None:
    table = Table(
        "method", *(TITLES[name] for name in problems), "lines", title="CPU ms until the goal is reached (steps × ms a step)"
    )
    for name, cells in found.items():
        row = []
        for problem in problems:
            cell = cells.get(problem)
            row.append(
                "not reached"
                if cell is None
                else f"{1e3 * cell['seconds']:.1f} ({cell['settings']['steps']} × {1e3 * cell['seconds_a_step']:.2f})"
            )
        table.add_row(name, *row, str(lines(METHODS[name].script)))
    console = Console(width=140)
    console.print(table)
    console.print(f"load {os.getloadavg()[0]:.1f}, torch {version('torch')}")


if __name__ == "__main__":
    main()
