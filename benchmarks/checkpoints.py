"""How long training waits for a checkpoint, how long it takes until it is complete, and what each process writes and reads.

Three ways take turns, on the same variables:

gathered    every tensor is gathered whole in one process, which copies, writes, synchronizes and hashes the files in turn,
            while training waits
waiting     every process writes what it holds, hashed while it is written, while training waits
background  every process copies what it holds, and goes on; a thread writes the copy. Training waits for the copy alone.
            Forward passes are taken until all is written, and then as many without a thread beside them.

Seconds are those of the slowest process, and medians over the rounds. Where processes share cores or a disk with other work,
read the ratios to "gathered", not the seconds.

Usage: python benchmarks/checkpoints.py [--megabytes 400] [--rounds 6] [--directory DIR] [--only torch|deepspeed|fsdp]
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

PROCESSES = 2
CASES: dict[str, dict[str, Any]] = {"torch": {"device": "cpu"}, "deepspeed": {}, "fsdp": {}}
"""Backend -> settings. The last two have two CPU processes each, with gloo."""
WIDTH = 1024
BYTES = 12  # of a parameter: its value and two moments, in float32


def gathered(directory: Path, variables: Sequence[Any], processes: Any) -> None:
    """Write whole tensors, each in the process that has the least so far."""
    from safetensors.torch import save_file

    from bilevel.files import write_through

    for v in variables:
        sizes, mine = [0] * processes.world_size, {}
        held = {f"weights/{name}": (name, v.sharding.local(name)) for name in v.sharding.parameters}
        for name in v.masters:
            held |= {
                f"optimizer/{name}/{key}": (name, value) for key, value in v.optimizer_state(name).items() if value.dim()
            }
        for key, (name, shard) in held.items():
            owner = sizes.index(min(sizes))
            sizes[owner] += shard.nbytes
            whole = v.sharding.gather(name, shard, owner)
            if whole is not None:
                mine[key] = whole.detach().to("cpu", copy=True).contiguous()
        file = directory / f"{v.name}-{processes.rank}.safetensors"
        save_file(mine, file)
        write_through(file)
        with file.open("rb") as stream:
            hashlib.file_digest(stream, "sha256")


def measure(name: str, megabytes: int, rounds: int, root: Path) -> dict[str, Any]:
    """The medians of every way, in this process."""
    from bilevel.background import Background
    from bilevel.optimizer import AdamW
    from bilevel.pieces import PieceFile
    from bilevel.plugins import load_plugins

    torch.set_num_threads(1)
    backend = load_plugins().find("backends", name).load()(dtype="float32", **CASES[name])
    backend.start(seed=0)
    rank, layers = backend.shard.rank, max(1, megabytes * 10**6 // (2 * BYTES * WIDTH**2))
    y = backend.place(
        "y", lambda: nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers))), AdamW(), sharded=True
    )
    z = backend.replicate(y, "z")
    batch = [torch.ones(1, WIDTH)]
    for v in (y, z):
        backend.activate(v, v.blocks.names)
        backend.backward(lambda rows, v=v: v(rows).square().mean(), batch, wrt={v: 1.0})
        backend.step(v, lr=1e-3)

    def work() -> None:
        backend.evaluate(lambda rows: y(rows).square().mean(), batch)

    def passes(until: Callable[[int], bool]) -> tuple[int, float]:
        count, started = 0, time.perf_counter()
        while not until(count):
            work()
            count += 1
        return count, time.perf_counter() - started

    def everywhere(done: bool) -> bool:
        return all(backend.all_gather(done))

    def take(way: str) -> dict[str, float]:
        """One checkpoint."""
        directory = root / way
        if rank == 0:
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()
            os.sync()  # or it would wait for what was written and removed before
        backend.all_gather(None)
        wall, cpu = time.perf_counter(), time.process_time()
        writing = None
        if way == "gathered":
            gathered(directory, [y, z], backend._processes)
        elif way == "waiting":
            backend.save(directory, [y, z], copy=False)()
        else:
            writing = Background(backend.save(directory, [y, z], copy=True))
        waited = time.perf_counter() - wall
        if writing is None:
            return {"waits": waited, "complete": waited, "cpu": time.process_time() - cpu}
        count, busy = passes(lambda _: everywhere(writing.outcome is not None))
        complete = time.perf_counter() - wall
        _, alone = passes(lambda done: everywhere(done >= count))
        return {"waits": waited, "complete": complete, "slower": busy / alone if count else 1.0}

    found: dict[str, list[dict[str, float]]] = {"gathered": [], "waiting": [], "background": []}
    for number in range(rounds + 1):
        order = list(found)
        for way in order[number % 3 :] + order[: number % 3]:
            found[way].append(take(way))
    medians = {
        way: {key: median(one[key] for one in results[1:]) for key in results[0]}  # the first round sets things up
        for way, results in found.items()
    }
    read, sizes = PieceFile.read, []

    def noted(self: PieceFile, tensor: str, places: range) -> torch.Tensor:
        part = read(self, tensor, places)
        sizes.append(part.nbytes)
        return part

    PieceFile.read = noted  # type: ignore[method-assign,assignment]
    started = time.perf_counter()
    backend.load(root / "background", [y, z])
    loading = time.perf_counter() - started
    written = sum(file.stat().st_size for file in (root / "background").glob(f"*-{rank + 1:05d}-of-*"))
    everything = sum(file.stat().st_size for file in (root / "background").iterdir())
    backend.close()
    return {"ways": medians, "written": written, "read": sum(sizes), "loading": loading, "all": everything}


def launched(name: str, options: argparse.Namespace, directory: str) -> list[dict[str, Any]]:
    """What each process has found."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)] if name != "torch" else []
    arguments = ["--serve", name, "--megabytes", str(options.megabytes), "--rounds", str(options.rounds)]
    command = [sys.executable, *launcher, __file__, *arguments, "--directory", directory]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    return [json.loads(file.read_text()) for file in sorted(Path(directory).glob("found-*.json"))]


def main() -> None:
    """Measure every backend, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--directory", help="on the disk to measure; by default, that of temporary files")
    parser.add_argument("--only", choices=CASES)
    parser.add_argument("--serve", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        where = Path(options.directory)
        result = measure(options.serve, options.megabytes, options.rounds, where)
        (where / f"found-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(result))
        os._exit(0)  # the processes need not wait for each other any more
    columns = (
        "backend",
        "way",
        "s/GB waiting",
        "ratio",
        "s/GB complete",
        "CPU s/GB",
        "a pass beside it",
        "MB written",
        "read",
    )
    table = Table(*columns)
    for name in [options.only] if options.only else CASES:
        with tempfile.TemporaryDirectory(dir=options.directory) as directory:
            processes = launched(name, options, directory)
        size = processes[0]["all"] / 1e9
        for way in processes[0]["ways"]:
            of_all = [process["ways"][way] for process in processes]
            waits, complete = (max(one[key] for one in of_all) for key in ("waits", "complete"))
            ratio = waits / max(process["ways"]["gathered"]["waits"] for process in processes)
            used = sum(one.get("cpu", 0) for one in of_all)
            beside = max(one.get("slower", 0) for one in of_all)
            ours = way != "gathered"
            table.add_row(
                f"{name}, {len(processes)}",
                way,
                *(f"{waits / size:.2f}", f"{ratio:.2f}", f"{complete / size:.2f}", f"{used / size:.2f}" if used else ""),
                f"{beside:.2f}" if beside else "",
                " + ".join(f"{process['written'] / 1e6:.0f}" for process in processes) if ours else "",
                " + ".join(f"{process['read'] / 1e6:.0f}" for process in processes) if ours else "",
            )
    Console(width=125).print(table)


if __name__ == "__main__":
    main()
