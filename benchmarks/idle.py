"""Where a step waits: how long the GPU has nothing to do, which kernels take its time, and where the host waits for it.

The recipe is run without writing anything. One step is taken under torch's profiler, and one with CUDA's debug mode for
synchronizations, which does not see copies from memory that is not pinned. On a CPU, the profiler's operations stand for
kernels: a dry run.

Usage: python benchmarks/idle.py RECIPE [--set KEY=VALUE ...]
       torchrun --nproc-per-node 8 benchmarks/idle.py RECIPE ...
"""

import argparse
import os
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bilevel import fit
from bilevel.config import load_config
from bilevel.launch import launched
from bilevel.plugins import load_plugins

PROFILED, WATCHED = 3, 5
"""The steps; those before warm caches up, and the one between lets the profiler's own work end."""
SHOWN = 15
OURS = ("bilevel", "transformers", "deepspeed", "torch/distributed")


class Watch:
    """Profiles one step of a run, and notes the places of another at which the host waits."""

    def __init__(self) -> None:
        self.cuda = torch.cuda.is_available()
        self.places: Counter[str] = Counter()
        self.profiler: Any = None
        self.seconds = 0.0

    def bilevel_run_start(self, *, run: Any) -> None:
        """Nothing yet."""

    def bilevel_step_end(self, *, run: Any, record: Any) -> None:
        """Begin or end to look, for the step that follows."""
        if record.step == PROFILED - 1:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.cuda
            self.profiler = profile(activities=activities, acc_events=True)
            self.profiler.start()
        if record.step == PROFILED:
            if self.cuda:
                torch.cuda.synchronize()
            self.profiler.stop()
            self.seconds = record.seconds
        if self.cuda and record.step == WATCHED - 1:
            torch.cuda.set_sync_debug_mode("warn")
            warnings.simplefilter("always")
            warnings.showwarning = self.note
        if self.cuda and record.step == WATCHED:
            torch.cuda.set_sync_debug_mode("default")

    def bilevel_run_end(self, *, run: Any, error: BaseException | None) -> None:
        """All has been seen."""

    def note(self, message: Any, *_: Any, **__: Any) -> None:
        """Count the place that a warning of a synchronization comes from."""
        if "synchroniz" in str(message):
            frames = [f for f in traceback.extract_stack() if any(part in f.filename for part in OURS)]
            self.places[" < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames[-3:]))] += 1

    def report(self) -> str:
        """What was seen, in lines."""
        kind = "CUDA" if self.cuda else "CPU"
        spans = [(e.time_range.start, e.time_range.end) for e in self.profiler.events() if e.device_type.name == kind]
        busy = covered(spans) / 1e6
        first, last = min(start for start, _ in spans), max(end for _, end in spans)
        sort = "self_cuda_time_total" if self.cuda else "self_cpu_time_total"
        lines = [
            f"busy                 {busy:.3f} s of {(last - first) / 1e6:.3f} s between the first kernel and the last",
            f"idle                 {1 - busy * 1e6 / (last - first):.1%}; the step took {self.seconds:.3f} s, profiled",
            f"waits of the host    {sum(self.places.values())} in a step"
            if self.cuda
            else "waits of the host    not seen here",
            *(f"  {count:4} {place}" for place, count in self.places.most_common(SHOWN)),
            self.profiler.key_averages().table(sort_by=sort, row_limit=SHOWN, max_name_column_width=70),
        ]
        return "\n".join(lines)


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """How much of a line spans cover, which may overlap: streams compute side by side."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def main() -> None:
    """Run, and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    config = load_config(options.recipe, load_plugins(), changes=[*options.changes, "solver.warmup=0"])
    watch = Watch()
    fit(config.problem, config.solver, config.backend, active=config.active, steps=WATCHED + 1, observer=watch)
    if watch.profiler is not None:  # in the first process alone
        print(watch.report())
    if launched():  # without the process group's farewell, which would wait for processes that have left
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
