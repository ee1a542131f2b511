"""As `memory.py`, for the backends of several processes: the plan beside what torch allocates in one of them.

Two peaks are taken, in a process of its own each:

- alone: one process that takes itself for one of two. Its collectives copy what they are given and send nothing (torch's
  "fake" process group), so that they hold no memory of their own, as NCCL's do not. This is what a plan is about.
- gloo: one of two CPU processes that train together. gloo's collectives work on copies: of all that is gathered, and of all
  that is reduced.

Usage: python benchmarks/memory_processes.py [--case NUMBER]
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import memory
import torch

SIZE = memory.Case(hidden=256, vocabulary=2048, length=64)
FEW_LIVE = {"zero_optimization": {"stage3_max_live_parameters": 2 * 10**6, "stage3_max_reuse_distance": 2 * 10**6}}
"""DeepSpeed's own numbers are those of large models, and would keep all of this one. With these, it frees blocks."""
CASES: list[tuple[str, dict[str, Any], int | None]] = [
    *(("deepspeed", {"zero_stage": stage}, 2) for stage in range(4)),
    ("deepspeed", {"zero_stage": 3, "activation_checkpointing": True}, 2),
    ("deepspeed", {"zero_stage": 3}, None),
    ("deepspeed", {"zero_stage": 3, "config": FEW_LIVE}, 2),
    ("deepspeed", {"zero_stage": 3, "config": FEW_LIVE, "activation_checkpointing": True}, 2),
    ("fsdp", {}, 2),
    ("fsdp", {"activation_checkpointing": True}, 2),
    ("fsdp", {}, None),
]
"""Backend, settings, blocks of LISA (None: all)."""
PROCESSES = 2


def pretend(processes: int) -> None:
    """Make this process the first of several that are not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)


def measure(number: int, directory: Path, size: memory.Case = SIZE) -> dict[str, int]:
    """Peak and plan of one case, in this process, which is one of several."""
    from bilevel import LISA, All, ScaleBiO
    from bilevel.planning.footprint import Footprint
    from bilevel.planning.hardware import Hardware
    from bilevel.planning.load import Setup
    from bilevel.planning.plan import make_plan
    from bilevel.plugins import load_plugins
    from bilevel_backends.variable import ModuleVariable

    name, settings, blocks = CASES[number]
    torch.set_num_threads(1)
    backend = load_plugins().find("backends", name).load()(dtype="bfloat16", **settings)
    rule, solver = All() if blocks is None else LISA(blocks=blocks), ScaleBiO(warmup=0)
    problem = memory.reweighting(size, directory)
    problem.prepare()
    backend.start(seed=0)
    model = Footprint(problem.cost(), "bfloat16")
    state = solver.init(problem, backend)
    split = backend.placement(PROCESSES).split_parameters
    live = 0
    for replica in state.replicas.values():
        assert isinstance(replica, ModuleVariable)
        backend.activate(replica, rule.heaviest(model.blocks, model.sizes)[0])
        held = [replica.sharding.local(n) if split else p for n, p in replica.sharding.parameters.items()]
        live += sum(tensor.nbytes for tensor in [*held, *replica.masters.values()])

    def two_steps() -> None:
        for t in range(2):
            solver.step(t, state, problem, backend)

    peak = memory.peak_of(two_steps, live)
    hardware = dataclasses.replace(Hardware(PROCESSES), context=0, communicator=0, fragmentation=0)
    plan = make_plan(model, Setup(backend, rule, solver.workload(), steps=3), hardware)
    backend.close()
    return {"torch": peak, "plan": plan.gpu_bytes}


def peaks(number: int, directory: str) -> dict[str, int]:
    """Plan and both peaks of one case."""
    found: dict[str, int] = {}
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(PROCESSES), "--master-port", "29741"]
    for kind, launcher in (("alone", []), ("gloo", torchrun)):
        command = [sys.executable, *launcher, __file__, "--case", str(number), "--directory", directory]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        measured = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("found "))[6:])
        found |= {"plan": measured["plan"], kind: measured["torch"]}
    return found


def main() -> None:
    """Run every case and print a line of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=int, help="one case alone, by number from 0")
    parser.add_argument("--directory", help="measure it in this process, with the model that is there; print JSON")
    options = parser.parse_args()
    if options.directory:
        if "RANK" not in os.environ:
            pretend(PROCESSES)
        found = measure(options.case, Path(options.directory))
        if os.environ["RANK"] == "0":
            print("found " + json.dumps(found), flush=True)
        os._exit(0)  # the processes need not wait for each other any more
    print(f"{'case':<70} {'plan':>8} {'alone':>8} {'ratio':>6} {'gloo':>8} {'ratio':>6}  (MB)")
    with tempfile.TemporaryDirectory() as directory:
        memory.problem(SIZE, Path(directory))
        for number in range(len(CASES)) if options.case is None else [options.case]:
            name, settings, blocks = CASES[number]
            found = peaks(number, directory)
            label = ", ".join(
                [name, *(f"{k}={v}" for k, v in settings.items()), "all" if blocks is None else f"{blocks} blocks"]
            )
            ratios = {kind: found["plan"] / found[kind] for kind in ("alone", "gloo")}
            columns = " ".join(f"{found[kind] / 1e6:8.1f} {ratio:6.3f}" for kind, ratio in ratios.items())
            print(f"{label:<70} {found['plan'] / 1e6:8.1f} {columns}", flush=True)


if __name__ == "__main__":
    main()
