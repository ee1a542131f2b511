"""As `memory.py`, for the backends of several processes: the plan beside what torch allocates in one of two CPU processes.

gloo's collectives copy where NCCL's do not, so the measured side is a little higher here than on GPUs.

Usage: python benchmarks/memory_processes.py
"""

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

SMALL_BUCKETS = {
    "zero_optimization": {
        "stage3_prefetch_bucket_size": 10**5,
        "stage3_max_live_parameters": 10**6,
        "stage3_max_reuse_distance": 10**6,
    }
}
"""For a model this small DeepSpeed's own would hold all of it; with these, a block is large beside a bucket, as it is in the
models that one splits."""
CASES: list[tuple[str, dict[str, Any], int | None]] = [
    *(("deepspeed", {"zero_stage": stage}, 2) for stage in range(4)),
    ("deepspeed", {"zero_stage": 3, "activation_checkpointing": True}, 2),
    ("deepspeed", {"zero_stage": 3}, None),
    ("deepspeed", {"zero_stage": 3, "config": SMALL_BUCKETS}, 2),
    ("deepspeed", {"zero_stage": 3, "config": SMALL_BUCKETS, "activation_checkpointing": True}, 2),
    ("fsdp", {}, 2),
    ("fsdp", {"activation_checkpointing": True}, 2),
    ("fsdp", {}, None),
]
"""Backend, settings, blocks of LISA (None: all)."""
PROCESSES = 2


def measure(number: int, directory: Path) -> dict[str, int]:
    """Peak and plan of one case, in this process."""
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
    problem = memory.reweighting(memory.Case(), directory)
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


def main() -> None:
    """Launch every case and print a line of each."""
    if "RANK" in os.environ:
        found = measure(int(sys.argv[1]), Path(sys.argv[2]))
        if os.environ["RANK"] == "0":
            print("found " + json.dumps(found), flush=True)
        os._exit(0)  # the processes need not wait for each other any more
    print(f"{'case':<70} {'plan':>8} {'torch':>8} {'ratio':>6}  (MB)")
    with tempfile.TemporaryDirectory() as directory:
        memory.problem(memory.Case(), Path(directory))
        for number, (name, settings, blocks) in enumerate(CASES):
            launch = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nproc-per-node",
                str(PROCESSES),
                "--master-port",
                "29741",
            ]
            command = [*launch, __file__, str(number), directory]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("found "))[6:])
            label = ", ".join(
                [name, *(f"{k}={v}" for k, v in settings.items()), "all" if blocks is None else f"{blocks} blocks"]
            )
            ratio = found["plan"] / found["torch"]
            print(f"{label:<70} {found['plan'] / 1e6:8.1f} {found['torch'] / 1e6:8.1f} {ratio:6.3f}", flush=True)


if __name__ == "__main__":
    main()
