"""What threads that wait for each other cost, by how they wait and by how busy the machine is.

The threads of torch on a CPU are those of OpenMP. After every operation they wait for the next one, and by default they
spin: on a quiet machine, they are there at once; beside other work, they take the cores from the thread that they wait for.

Each policy has a process of its own, which waits for its turn. In turn, they take forward and backward passes of two small
networks, with as many threads as there are cores, and the share of the cores that other processes had meanwhile is noted.

Usage: python benchmarks/waiting.py [--seconds 120] [--work]   (--work: keep the cores busy meanwhile)
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

POLICIES: dict[str, dict[str, str]] = {
    "default": {},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
}
SIZES = {"256 wide": (256, 15), "1024 wide": (1024, 1)}  # width of the layers, passes of a turn
QUIET, BUSY = 0.1, 0.5  # shares of the cores that others have at most, and at least


def serve() -> None:
    """Take a turn for every line of input, and print its seconds and CPU seconds a pass."""
    import torch

    nets = {}
    for name, (width, _) in SIZES.items():
        net = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(8)))
        nets[name] = net, torch.randn(512, width)
    for line in sys.stdin:
        name = line.strip()
        (net, inputs), passes = nets[name], SIZES[name][1]
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(passes):
            net(inputs).square().mean().backward()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(json.dumps({"wall": wall / passes, "cpu": cpu / passes, "whole": wall, "spent": cpu}), flush=True)


def spent() -> float:
    """CPU seconds of all processes of the machine so far."""
    with open("/proc/stat") as file:
        ticks = [int(word) for word in file.readline().split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


@contextmanager
def work(busy: bool) -> Iterator[None]:
    """Other work, if asked for."""
    cores = os.cpu_count() or 1
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores if busy else 0)]
    try:
        yield
    finally:
        for other in others:
            other.kill()


def main() -> None:
    """Let all policies take turns, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--work", action="store_true")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    threads = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    servers = {
        policy: subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            env=threads | more,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for policy, more in POLICIES.items()
    }

    def turn(policy: str, size: str) -> dict[str, Any]:
        server, before = servers[policy], spent()
        assert server.stdin is not None
        assert server.stdout is not None
        print(size, file=server.stdin, flush=True)
        found: dict[str, Any] = json.loads(server.stdout.readline())
        found["others"] = (spent() - before - found["spent"]) / found["whole"] / (os.cpu_count() or 1)
        return found

    turns: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with work(options.work):
        for policy in POLICIES:
            for size in SIZES:
                turn(policy, size)  # the first one sets things up
        end = time.perf_counter() + options.seconds
        while time.perf_counter() < end:
            for size in SIZES:
                for policy in POLICIES:
                    turns.setdefault((policy, size), []).append(turn(policy, size))
    for server in servers.values():
        server.kill()
    table = Table("policy", "network", "turns", "ms a pass", "CPU ms a pass", title=f"{os.cpu_count()} cores")
    for share in ("quiet", "busy"):
        for (policy, size), all_of_it in turns.items():
            found = [one for one in all_of_it if (one["others"] <= QUIET if share == "quiet" else one["others"] >= BUSY)]
            numbers = [f"{1e3 * median(one[key] for one in found):.1f}" for key in ("wall", "cpu")] if found else ["-", "-"]
            table.add_row(policy, size, f"{len(found)} {share}", *numbers)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
