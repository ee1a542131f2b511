"""Tokens a second, model FLOP utilization and peak memory of a recipe, beside what its plan says.

The recipe is run without writing anything: its data and model must be there. Utilization is the plan's FLOPs for as many
tokens as were processed, over what the device could do in the time; the plan counts full rows, so rows that are shorter
make it an estimate. Steps that hold the upper variable are left out.

Usage: python benchmarks/throughput.py RECIPE [--steps 20] [--set KEY=VALUE ...] [--peak-tflops 989]
       torchrun --nproc-per-node 8 benchmarks/throughput.py RECIPE ...
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from bilevel import fit
from bilevel.config import load_config
from bilevel.launch import launched, rank, world_size
from bilevel.plan_report import plan_run
from bilevel.planning.hardware import Hardware
from bilevel.plugins import load_plugins


@dataclass(frozen=True)
class Measured:
    """What a recipe was measured to do.

    devices: how many there were, and what they are called. seconds: of a step. planned: seconds of a step, by the plan.
    tokens: that a second processed. utilization: the share of the devices' peak that the model's FLOPs took.
    peak, planned_peak: bytes on one device; None where there is no GPU.
    """

    devices: str
    seconds: float
    planned: float
    tokens: float
    utilization: float
    peak: int | None
    planned_peak: int

    def __str__(self) -> str:
        lines = [
            f"devices              {self.devices}",
            f"seconds a step       {self.seconds:.3f}; the plan says {self.planned:.3f}",
            f"tokens a second      {self.tokens:,.0f}",
            f"model FLOPs used     {self.utilization:.1%} of the peak",
        ]
        if self.peak is not None:
            ratio = self.planned_peak / self.peak
            lines.append(
                f"peak memory of one   {self.peak / 1e9:.2f} GB; the plan says {ratio:.2f} of it, with its reserves"
            )
        return "\n".join(lines)


def measure(recipe: Path, changes: Sequence[str] = (), *, steps: int = 20, peak_tflops: float = 989.0) -> Measured | None:
    """Run a recipe on the devices that there are. Returns None in all processes but the first.

    steps: after the warm-up. peak_tflops: of one device, in the recipe's precision.
    """
    config = load_config(recipe, load_plugins(), changes=changes)
    if hasattr(config.solver, "warmup"):
        config = load_config(recipe, load_plugins(), changes=[*changes, "solver.warmup=2"])
    devices = world_size()
    report = plan_run(config, Hardware(gpus=devices, peak_tflops=peak_tflops))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    history = fit(
        config.problem, config.solver, config.backend, active=config.active, steps=steps + 4, seed=config.run.seed
    ).history[4:]  # the first two may hold the upper variable, the next two warm caches up
    if rank() > 0:
        return None
    seconds, tokens = median(r.seconds for r in history), median(r.size for r in history)
    flops = report.plan.flops / report.plan.units * tokens
    return Measured(
        devices=f"{devices} × {torch.cuda.get_device_name() if cuda else 'CPU'}",
        seconds=seconds,
        planned=report.plan.step_seconds,
        tokens=tokens / seconds,
        utilization=flops / seconds / (devices * peak_tflops * 1e12),
        peak=torch.cuda.max_memory_allocated() if cuda else None,
        planned_peak=report.plan.gpu_bytes,
    )


def main() -> None:
    """Run, and print a line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--steps", type=int, default=20, help="after the warm-up")
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="of one device, in the recipe's precision")
    options = parser.parse_args()
    found = measure(options.recipe, options.changes, steps=options.steps, peak_tflops=options.peak_tflops)
    if found is not None:
        print(found)
    if launched():  # without the process group's farewell, which would wait for processes that have left
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
