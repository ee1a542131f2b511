"""CPU time of an upper step of one run, when many runs go side by side (`fit_many`), over that of a bare PyTorch loop.

The runs are F2SA with ten lower steps and different step sizes of x, on the problems of `benchmarks/overhead.py`, whose bare
loop is the unit. All variants run in one process, in turn, so that a change in the machine's speed hits all; printed is the
median over the rounds of a step's time, without the first few steps, in which operations are recorded, and the time of these
by itself. The first run must arrive where the bare loop arrives, or the benchmark fails.

Usage: OMP_NUM_THREADS=1 python benchmarks/side_by_side.py [--rounds 3] [--runs 1 8 64] [--problems NAME ...] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from overhead import AGREE, CASES, LR_X, LR_Z, METHODS, PENALTY, Case, run_bare, run_ours
from rich.console import Console
from rich.table import Table

from bilevel import F2SA, Backend, Metrics, Problem, State, fit_many
from bilevel_backends.torch_backend import TorchBackend

LOWER_STEPS = 10
TITLE = "CPU time of a step of one run, over that of a bare loop"
FEW = 3  # steps of each run that are not timed by themselves


@dataclass(frozen=True)
class Timed(F2SA):
    """F2SA that remembers the CPU time at the end of every step."""

    ends: list[float] = field(default_factory=list)

    def step(self, t: int, state: State, problem: Problem[Any], backend: Backend) -> Metrics:
        """Do the step of F2SA, and look at the clock."""
        found = super().step(t, state, problem, backend)
        self.ends.append(time.process_time())
        return found


def run_many(case: Case, runs: int, steps: int) -> tuple[float, float, torch.Tensor]:
    """CPU seconds of a step of all runs, of what comes before the first timed one, and where the first run arrives.

    The step of x becomes smaller from run to run.
    """
    ends: list[float] = []
    solvers = [
        Timed(penalty=PENALTY, lr_z=LR_Z, lr_x=LR_X * 0.98**k, lower_steps=LOWER_STEPS, ends=ends) for k in range(runs)
    ]
    started = time.process_time()
    found = fit_many(case.problem, solvers, TorchBackend(device="cpu"), steps=FEW + steps)
    return (ends[-1] - ends[FEW - 1]) / steps, ends[FEW - 1] - started, next(iter(found.x.values()))[0, 0]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runs", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--problems", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    method = METHODS["f2sa"]
    columns = [f"{n} runs" for n in options.runs]
    table = Table("problem", "bare, ms", "fit", *columns, "once, s", title=TITLE)
    found = {}
    for name in options.problems:
        case = CASES[name]
        first, _ = run_bare(method, case, LOWER_STEPS, 6)
        count = min(max(int(0.3 / first), 10), 200)
        bare, ours, once = [], [], 0.0
        many: dict[int, list[float]] = {n: [] for n in options.runs}
        for _ in range(options.rounds):
            seconds, there = run_bare(method, case, LOWER_STEPS, FEW + count)
            bare.append(seconds)
            ours.append(run_ours(method, case, LOWER_STEPS, FEW + count, None)[0])
            for n in options.runs:
                seconds, once, here = run_many(case, n, count)
                torch.testing.assert_close(here, there, rtol=AGREE, atol=AGREE)
                many[n].append(seconds / n)
        unit = median(bare)
        ratios = {"fit": median(ours) / unit, **{str(n): median(many[n]) / unit for n in options.runs}}
        found[name] = {"bare": unit, "once": once, **ratios}
        table.add_row(name, f"{1e3 * unit:.2f}", *(f"{ratio:.3f}" for ratio in ratios.values()), f"{once:.1f}")
    console = Console(width=120)
    console.print(table)
    console.print(f"load {os.getloadavg()[0]:.1f}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
