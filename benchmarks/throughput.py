"""Tokens a second, model FLOP utilization and peak memory of a recipe, beside what its plan says.

The recipe is run without writing anything: its data and model must be there. Utilization is the plan's FLOPs for as many
tokens as were processed, over what the device could do in the time; the plan counts full rows, so rows that are shorter
make it an estimate. Steps that hold the upper variable are left out.

Usage: python benchmarks/throughput.py RECIPE [--steps 20] [--set KEY=VALUE ...] [--peak-tflops 989]
       torchrun --nproc-per-node 8 benchmarks/throughput.py RECIPE ...
"""

import argparse
from pathlib import Path
from statistics import median

import torch

from bilevel import fit
from bilevel.config import load_config
from bilevel.launch import rank, world_size
from bilevel.plan_report import plan_run
from bilevel.planning.hardware import Hardware
from bilevel.plugins import load_plugins


def main() -> None:
    """Run, and print a line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--steps", type=int, default=20, help="after the warm-up")
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="of one device, in the recipe's precision")
    options = parser.parse_args()

    changes = [*options.changes, "solver.warmup=2"]
    config = load_config(options.recipe, load_plugins(), changes=changes)
    devices = world_size()
    report = plan_run(config, Hardware(gpus=devices, peak_tflops=options.peak_tflops))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    history = fit(
        config.problem, config.solver, config.backend, active=config.active, steps=options.steps + 4, seed=config.run.seed
    ).history[4:]  # the first two hold the upper variable, the next two warm caches up

    if rank() > 0:
        return
    seconds, tokens = median(r.seconds for r in history), median(r.size for r in history)
    flops = report.plan.flops / report.plan.units * tokens
    peak_flops = devices * options.peak_tflops * 1e12
    print(f"devices              {devices} × {torch.cuda.get_device_name() if cuda else 'CPU'}")
    print(f"seconds a step       {seconds:.3f}")
    print(f"tokens a second      {tokens / seconds:,.0f}")
    print(f"model FLOPs used     {flops / seconds / peak_flops:.1%} of {devices} × {options.peak_tflops:g} TFLOP/s")
    if cuda:
        peak = torch.cuda.max_memory_allocated()
        print(
            f"peak memory of one   {peak / 1e9:.2f} GB; the plan says {report.plan.gpu_bytes / 1e9:.2f} GB with its reserves"
        )


if __name__ == "__main__":
    main()
