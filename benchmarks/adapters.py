"""Reweighting with LISA, with adapters, and with both, on the demo: CPU time of a step, peak memory, and the weights.

The recipe is examples/python_docs/recipe.yaml: four sources and SmolLM2-135M in float32. All methods take their steps in
turn, in one process, so that a change in the machine's speed hits all of them. The step size of weights is the recipe's, and
that of adapters ten times as much. A peak is what torch's allocator holds in two steps of a method, from its profiler; that
of all weights is left to the plan, since it is much for a small machine.

Usage: python benchmarks/adapters.py [--steps 5] [--weights] [--set KEY=VALUE ...]
       (--weights also carries out the runs with LISA and with adapters, some minutes each; --steps 0 leaves the rest out)
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from memory import peak_of
from rich.console import Console
from rich.table import Table

from bilevel.config import Config, load_config
from bilevel.planning.footprint import Footprint
from bilevel.planning.hardware import Hardware
from bilevel.planning.load import Setup
from bilevel.planning.plan import make_plan
from bilevel.plugins import load_plugins

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "examples" / "python_docs"
ADAPTERS = ["problem.lora.rank=16", "solver.lr_z=3e-3"]
METHODS: dict[str, list[str]] = {
    "LISA, 4 of 30 blocks": [],
    "adapters of rank 16": [*ADAPTERS, "active={name: all}"],
    "both": ADAPTERS,
    "all weights": ["active={name: all}"],
}
MEASURED = [method for method in METHODS if method != "all weights"]


def configured(method: str, data: Path, output: Path, changes: list[str]) -> Config:
    """The demo with a method's settings, on data that `prepare.py` has written."""
    recipe = (DEMO / "recipe.yaml").read_text().replace("runs/demo-data", str(data))
    output.mkdir(parents=True, exist_ok=True)
    file = output / "recipe.yaml"
    file.write_text(recipe)
    return load_config(file, load_plugins(), changes=[*METHODS[method], *changes], output=str(output / "run"))


def planned(config: Config) -> int:
    """The plan's bytes, without what only a GPU takes."""
    backend: Any = config.backend
    setup = Setup(config.backend, config.active, config.solver.workload(), steps=config.run.limit)
    hardware = Hardware(gpu_memory=1e6, context=0, fragmentation=0)
    return make_plan(Footprint(config.problem.cost(), backend.dtype), setup, hardware).gpu_bytes


class Steps:
    """The steps of a run, one at a time; and what torch holds before them."""

    def __init__(self, config: Config) -> None:
        self.config = config
        config.problem.prepare()
        config.backend.start(seed=0)
        self.state = config.solver.init(config.problem, config.backend)
        backend: Any = config.backend
        tensors = [t for v in self.state.variables for t in v.module.parameters()]
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        self.held = sum(held.values())
        with torch.no_grad():
            y = next(iter(self.state.replicas.values()))
            measure: Callable[..., Any] = lambda what, batch: {k: float(v) for k, v in what(y, batch).items()}  # noqa: E731
            config.problem.examine(measure)
        backend.processed = 0

    def begin(self) -> None:
        """The first two steps: moments exist from the second one on."""
        self.take(0)
        self.take(1)

    def take(self, t: int) -> None:
        """Step t."""
        self.state.activate(self.config.active, t, 0, self.config.backend)
        self.config.solver.step(t, self.state, self.config.problem, self.config.backend)


def timed(configs: dict[str, Config], count: int, found: dict[str, dict[str, Any]]) -> None:
    """Note the peak of each method, and the CPU time of its steps, in turn with those of the others."""
    steps = {method: Steps(configs[method]) for method in MEASURED}
    for method, one in steps.items():
        found[method]["peak"] = peak_of(one.begin, one.held) / 1e9
    seconds: dict[str, list[float]] = {method: [] for method in MEASURED}
    for t in range(2, 2 + count):
        for method, one in steps.items():
            started = time.process_time()
            one.take(t)
            seconds[method].append(time.process_time() - started)
    for method, one in steps.items():
        ratios = [own / lisa for own, lisa in zip(seconds[method], seconds[MEASURED[0]], strict=True)]
        found[method] |= {"seconds": median(seconds[method]), "ratio": [median(ratios), min(ratios), max(ratios)]}
        one.config.backend.close()


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="steps of each method, after a first one")
    parser.add_argument("--weights", action="store_true", help="carry the runs out, and print the weights that come out")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe for all methods")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, Any]] = {method: {} for method in METHODS}
    with tempfile.TemporaryDirectory() as directory:
        where = Path(directory)
        subprocess.run([sys.executable, str(DEMO / "prepare.py"), str(where / "data")], check=True, capture_output=True)
        configs = {
            method: configured(method, where / "data", where / str(i), options.set) for i, method in enumerate(METHODS)
        }
        for method, config in configs.items():
            found[method]["plan"] = planned(config) / 1e9
        if options.steps:
            timed(configs, options.steps, found)
        for method in MEASURED[:2] if options.weights else ():
            result = configs[method].fit()
            found[method] |= {
                "weights": result.history[-1].average,
                "seconds of the run": sum(r.seconds for r in result.history),
            }
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1))
    table = Table("method", "plan, GB", "torch, GB", "CPU seconds a step", "over LISA", "weights")
    for method, numbers in found.items():
        ratio = "{:.2f} ({:.2f} to {:.2f})".format(*numbers["ratio"]) if "ratio" in numbers else ""
        weights = ", ".join(f"{name} {weight:.3f}" for name, weight in numbers.get("weights", {}).items())
        cells = (f"{numbers[key]:.2f}" if key in numbers else "" for key in ("plan", "peak", "seconds"))
        table.add_row(method, *cells, ratio, weights)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
