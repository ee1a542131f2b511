"""Are the weights that a solver learns the best ones? Measured against brute force, where the best mix is known.

For each case and each of ten data seeds: the best mix for K steps of training is found by training on many mixes (see
`dialect_models.BruteForce`), and the solver runs for at most 480 steps. Printed are the regret, as a share of the gain of
the best mix over equal weights, and the largest error of a weight.

Usage: python benchmarks/optimum.py [tables | llama | settings | evidence | blocks | targets] [--seeds 10] [--solver rounds]
       [--cases NAME ...] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dialect_models import Array, BruteForce, LlamaDialects
from rich.console import Console
from rich.table import Table

from bilevel import LISA, Active, All, Rounds, ScaleBiO, Solver, fit
from bilevel.evidence import Evidence
from bilevel_backends.torch_backend import TorchBackend
from bilevel_llm.reweighting.targets import Mix, comparisons
from bilevel_problems.dialects import Dialects

HORIZON = 40
PURE7 = [[float(i == j) for j in range(7)] for i in range(7)]
CASES: Mapping[str, Mapping[str, Any]] = {
    "2 sources, .7/.3": {"target": [0.7, 0.3], "noise": 0},
    "2 sources, .7/.3, twice the rows": {"target": [0.7, 0.3], "noise": 0, "rows": 2000, "batch_size": 48},
    "2 sources, .9/.1": {"target": [0.9, 0.1], "noise": 0},
    "3 with noise, .6/.4": {"target": [0.6, 0.4]},
    "3 with noise, .85/.15": {"target": [0.85, 0.15]},
    "8 with noise, .35/.25/.2/.1/.1/0/0": {"mixes": PURE7, "target": [0.35, 0.25, 0.2, 0.1, 0.1, 0.0, 0.0]},
    "8 with noise, .35/.25/.2/.1/.1/0/0, more rows": {
        "mixes": PURE7, "target": [0.35, 0.25, 0.2, 0.1, 0.1, 0.0, 0.0], "rows": 2000, "batch_size": 64
    },
    "8 with mixed sources and noise": {
        "mixes": [
            [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0.5, 0.5, 0, 0], [0, 0.5, 0.5, 0], [0, 0, 0.3, 0.7]
        ],
        "target": [0.4, 0.1, 0.4, 0.1],
    },
}  # fmt: skip
SOLVERS: Mapping[str, Solver[Any]] = {"rounds": Rounds(horizon=HORIZON), "scalebio": ScaleBiO(warmup=50)}
console = Console(width=150)


def learn(
    problem: Dialects, solver: Solver[Any], seed: int, steps: int = 480, active: Active | None = None
) -> tuple[Array, Any]:
    """The weights that a run comes to (in a single loop: the mean over its second half), and its history."""
    history = fit(problem, solver, TorchBackend(), steps=steps, seed=seed, active=active).history
    if history[-1].average:
        return np.array(list(history[-1].average.values())), history
    half = history[len(history) // 2 :]
    return np.array([list(record.upper.values()) for record in half]).mean(0), history


def evidence_of(history: Any) -> Evidence:
    """The rounds of a run."""
    ends = [record for record in history if "signal" in record.parts]
    tables = [np.array([list(record.parts[key].values()) for record in ends]) for key in ("tried", "signal", "prior")]
    return Evidence(tables[0], tables[1], int(ends[-1].metrics["folds"]), tables[2][-1], ends[-1].metrics["pull"])


def bars(names: Sequence[str], seeds: int, solver: Solver[Any], *, llama: bool, lr: float) -> list[dict[str, Any]]:
    """Regret and error of each case."""
    table = Table(
        "case", "gain ± s.e.", "regret: median", "largest", "≤ 5%", "error ≤ .07", "noise ≤ .05", "covered", "steps, s"
    )
    found = []
    for name in names:
        rows: list[dict[str, Any]] = []
        for seed in range(seeds):
            problem = (LlamaDialects if llama else Dialects)(**{**CASES[name], "instance": seed})
            brute = BruteForce(problem, HORIZON, lr, rep=8)
            curve = None
            if not llama:
                best = brute.optimum()
            elif len(problem.mixes) == 2:
                curve = brute.curve()
                best = _minimum(curve, len(problem.names))
            else:
                best = replace(brute, rep=32, stream=1, known={}).by_law()
            started = time.process_time()
            weights, history = learn(problem, replace(solver, lr_z=lr), seed)  # type: ignore[type-var]
            seconds = time.process_time() - started
            uniform = np.full(len(best), 1 / len(best))
            at_best, at_uniform, at_found = brute.losses(np.array([best, uniform, weights]))
            if curve is not None:  # what the noise source has is next to nothing
                at_best, at_found = float(curve(best[0])), float(curve(weights[0] / weights[:2].sum()))
            gain = at_uniform - at_best
            row = {
                "seed": seed, "best": best.tolist(), "found": weights.tolist(), "gain": gain,
                "gain_error": brute.error(np.array([best, uniform])), "regret": (at_found - at_best) / gain,
                "error": float(np.abs(weights - best).max()), "seconds": seconds,
                "noise": float(weights[-1]) if problem.noise else 0.0,
            }  # fmt: skip
            if "signal" in history[-1].parts:
                low, high = evidence_of(history).intervals
                row["covered"] = float(np.mean((low <= best + 0.005) & (best - 0.005 <= high)))
            rows.append(row)
            console.print(f"{name}, {seed}: { ({k: np.round(v, 3) for k, v in row.items()}) }", highlight=False)

        def count(holds: Callable[[dict[str, Any]], bool], rows: list[dict[str, Any]] = rows) -> str:
            return f"{sum(map(holds, rows))}/{len(rows)}"

        regret = [row["regret"] for row in rows]
        table.add_row(
            name,
            f"{np.mean([row['gain'] for row in rows]):.3f} ± {np.mean([row['gain_error'] for row in rows]):.4f}",
            f"{np.median(regret):.1%}",
            f"{max(regret):.1%}",
            count(lambda row: row["regret"] <= 0.05),
            count(lambda row: row["error"] <= 0.07),
            count(lambda row: row["noise"] <= 0.05),
            f"{np.mean([row['covered'] for row in rows]):.0%}" if "covered" in rows[0] else "–",
            f"480, {np.median([row['seconds'] for row in rows]):.1f}",
        )
        found.append({"case": name, "runs": rows})
        console.print(table)
    return found


def _minimum(curve: np.poly1d, k: int) -> Array:
    """The mix of the first two of k sources at which the curve is smallest, near where it was fitted."""
    turns = [float(t.real) for t in curve.deriv().roots if abs(t.imag) < 1e-9 and curve.deriv(2)(t.real) > 0]
    share = float(np.clip(turns[0], 0.0, 1.0)) if turns else float(curve(1.0) < curve(0.0))
    return np.array([share, 1 - share] + [0.0] * (k - 2))


def settings(seeds: int, lr: float) -> list[dict[str, Any]]:
    """How much the answer depends on what it should not depend on."""
    plain = Rounds(horizon=HORIZON, lr_z=lr)
    table = Table("what is changed", "case", "largest change of a weight, mean", "largest")
    found = []

    def show(what: str, case: str, changes: list[float]) -> None:
        table.add_row(what, case, f"{np.mean(changes):.3f}", f"{max(changes):.3f}")
        found.append({"what": what, "case": case, "changes": changes})

    for case in ("2 sources, .7/.3", "3 with noise, .85/.15", "8 with noise, .35/.25/.2/.1/.1/0/0"):
        problems = [Dialects(**{**CASES[case], "instance": seed}) for seed in range(seeds)]
        base = [learn(problem, plain, seed)[0] for seed, problem in enumerate(problems)]
        for what, solver, steps in (
            ("trust × 2", replace(plain, trust=2.0), 480),
            ("trust ÷ 2", replace(plain, trust=0.5), 480),
            ("twice the rounds", plain, 960),
        ):
            other = [learn(problem, solver, seed, steps)[0] for seed, problem in enumerate(problems)]
            show(what, case, [float(np.abs(a - b).max()) for a, b in zip(base, other, strict=True)])
        turned = []
        for seed, problem in enumerate(problems):
            order = np.roll(np.arange(len(problem.names)), 1)
            reordered = Dialects(**{**CASES[case], "instance": seed})
            reordered.__dict__["training"] = problem.training[order]
            turned.append(float(np.abs(learn(reordered, plain, seed)[0] - base[seed][order]).max()))
        show("the order of the sources (and with it the draws)", case, turned)
        split = []
        for seed in range(seeds):
            mixes = CASES[case].get("mixes", [[1.0, 0.0], [0.0, 1.0]])
            halved = Dialects(**{**CASES[case], "mixes": [mixes[0], *mixes], "instance": seed})
            weights = learn(halved, plain, seed)[0]
            split.append(float(np.abs(np.array([weights[0] + weights[1], *weights[2:]]) - base[seed]).max()))
        show("the first source in two halves, added up", case, split)
    twins = [
        learn(Dialects(mixes=[[1.0, 0.0], [1.0, 0.0]], target=[0.8, 0.2], noise=0, instance=seed), plain, seed)[0][0]
        for seed in range(seeds)
    ]
    table.add_row("two equally good sources", f"{min(twins):.2f} to {max(twins):.2f}", "", "")
    for k in (4, 16, 32):
        odds = []
        for seed in range(seeds):
            mixes = [[1.0, 0.0]] + [[0.0, 1.0]] * (k - 1)
            weights = learn(
                Dialects(mixes=mixes, target=[0.7, 0.3], noise=0, batch_size=3 * k, rows=400, instance=seed), plain, seed
            )[0]
            odds.append(float(np.log(weights[0] / weights[1:].sum())))
        table.add_row(f"one source against {k - 1} alike", "log-odds", f"{np.mean(odds):.2f}", f"sd {np.std(odds):.2f}")
        found.append({"what": f"1 against {k - 1}", "odds": odds})
    console.print(table)
    return found


def evidence(seeds: int, lr: float) -> list[dict[str, Any]]:
    """How often a run without a true order claims one, and how often a true one is found, or turned round."""
    table = Table("case", "steps", "rounds", "runs that claim an order", "pairs found", "pairs turned round")
    found = []
    for k in (4, 8):
        for horizon, steps in ((20, 20), (20, 300), (20, 1000), (40, 480)):
            claims = 0
            for seed in range(seeds):
                null = Dialects(
                    mixes=[[1.0, 0.0]] * k, target=[0.8, 0.2], noise=0, batch_size=3 * k, rows=400, instance=seed
                )
                _, history = learn(null, Rounds(horizon=horizon, lr_z=lr), seed, steps)
                claims += bool(_claimed(evidence_of(history)))
            table.add_row(f"{k} alike", f"{steps}", f"{steps // horizon}", f"{claims}/{seeds}", "", "")
            found.append({"case": f"null {k}", "steps": steps, "claims": claims, "runs": seeds})
    for case in list(CASES)[:4]:
        pairs = right = wrong = 0
        for seed in range(seeds):
            problem = Dialects(**{**CASES[case], "instance": seed})
            claimed = _claimed(evidence_of(learn(problem, Rounds(horizon=HORIZON, lr_z=lr), seed)[1]))
            pairs += len(problem.names) - 1
            right += sum(i < j for i, j in claimed)
            wrong += sum(i > j for i, j in claimed)
        table.add_row(case, "480", "12", "", f"{right}/{pairs}", f"{wrong}/{pairs}")
        found.append({"case": case, "pairs": pairs, "right": right, "wrong": wrong})
    console.print(table)
    return found


def blocks(seeds: int, lr: float) -> list[dict[str, Any]]:
    """How often a tiny Llama claims an order of four sources that are alike, with all blocks and with LISA."""
    table = Table("active", "steps", "rounds", "runs that claim an order")
    found = []
    for name, active in (("all blocks", All()), ("LISA, 2 of 4 blocks", LISA(blocks=2, period=5))):
        claims = 0
        for seed in range(seeds):
            null = LlamaDialects(mixes=[[1.0, 0.0]] * 4, target=[0.8, 0.2], noise=0, batch_size=12, rows=400, instance=seed)
            claims += bool(_claimed(evidence_of(learn(null, Rounds(horizon=20, lr_z=lr), seed, 240, active)[1])))
        table.add_row(name, "240", "12", f"{claims}/{seeds}")
        found.append({"active": name, "claims": claims, "runs": seeds})
        console.print(table)
    return found


def targets(seeds: int, lr: float) -> list[dict[str, Any]]:
    """Two targets, each in a run of its own: are the intervals right, and what is claimed of the two?

    With the same shares, the targets differ by their rows alone, and nothing should be claimed.
    """
    table = Table("shares of the targets", "covered", "largest error", "pairs told apart", "turned round", "runs that claim")
    found = []
    for first, second in ((0.7, 0.4), (0.6, 0.6)):
        covered, errors, right, wrong, claims = [], [], 0, 0, 0
        for seed in range(seeds):
            mixes = []
            for number, share in enumerate((first, second)):
                problem = Dialects(target=[share, 1 - share], noise=1, instance=seed)
                problem.__dict__["validation"] = problem.draw([*problem.target, 0.0], problem.rows, 2, number)
                weights, history = learn(problem, Rounds(horizon=HORIZON, lr_z=lr), seed)
                said = evidence_of(history)
                ends = list(zip(*said.intervals, strict=True)) if said.enough and said.ordered else []
                best = BruteForce(problem, HORIZON, lr).optimum()
                covered += (
                    [low - 0.005 <= w <= high + 0.005 for (low, high), w in zip(ends, best, strict=True)] if ends else []
                )
                errors.append(float(np.abs(weights - best).max()))
                named = {name: (float(low), float(high)) for name, (low, high) in zip(problem.names, ends, strict=False)}
                mixes.append(Mix("ab"[number], dict(zip(problem.names, weights, strict=True)), named, None, len(history)))
            claimed = [words for words in comparisons(mixes) if "wants more" in words]
            claims += bool(claimed)
            right += any(words.startswith("'a' wants more of 'mix-0'") for words in claimed)
            wrong += any(words.startswith("'b' wants more of 'mix-0'") for words in claimed)
        row = {"shares": [first, second], "covered": float(np.mean(covered)), "entries": len(covered), "error": max(errors)}
        found.append({**row, "right": right, "wrong": wrong, "claims": claims, "runs": seeds})
        table.add_row(
            f"{first:g}, {second:g}", f"{np.mean(covered):.0%} of {len(covered)}", f"{max(errors):.2f}",
            f"{right}/{seeds}" if first > second else "", f"{wrong}/{seeds}" if first > second else "", f"{claims}/{seeds}",
        )  # fmt: skip
        console.print(table)
    return found


def _claimed(evidence: Evidence) -> list[tuple[int, int]]:
    ranked = np.argsort(-evidence.answer).tolist()
    return [(i, j) for i, j in pairwise(ranked) if evidence.clear(i, j)]


def main() -> None:
    """Measure, print, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "what", choices=["tables", "llama", "settings", "evidence", "blocks", "targets"], nargs="?", default="tables"
    )
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--solver", choices=list(SOLVERS), default="rounds")
    parser.add_argument("--cases", nargs="*", default=None)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    solver = SOLVERS[args.solver]
    if args.what == "tables":
        found = bars(args.cases or list(CASES), args.seeds, solver, llama=False, lr=0.02)
    elif args.what == "llama":
        found = bars(args.cases or list(CASES)[:4], args.seeds, solver, llama=True, lr=5e-3)
    elif args.what == "blocks":
        found = blocks(args.seeds, 5e-3)
    elif args.what == "targets":
        found = targets(args.seeds, 0.02)
    else:
        found = settings(args.seeds, 0.02) if args.what == "settings" else evidence(args.seeds, 0.02)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
