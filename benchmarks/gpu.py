"""A trial of everything on a machine with GPUs: what works, how fast it is, and whether the plan is right.

Each section runs commands one after another, each in a process of its own with a limit of time, so that one that fails or
hangs does not take the others with it. What they print goes to the terminal and, with the commands, into REPORT.md of the
output directory. Models are random and of real widths (`benchmarks/random_models.py`): nothing is downloaded.

    machine     versions, devices, plugins                                                      seconds
    tests       the contracts, and make test-gpu: CUDA and every backend against one CPU        minutes
    micro       1B: micro-batches, recomputation, determinism, compiling                        8 runs of a minute
    width       8B and 32B width, some layers: tokens a second, utilization, memory and plan    6 runs of a minute
    backends    1B under ZeRO 0 to 3 and FSDP, with offloading, on all GPUs                     7 runs of a minute
    waits       where a step waits, on one GPU and under both launchers' backends               3 runs of a minute

Usage: python benchmarks/gpu.py [SECTION ...] [--output runs/gpu] [--tiny]    (--tiny: a dry run, on any machine)
"""

import argparse
import importlib.metadata
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "torch",
    "transformers",
    "deepspeed",
    "accelerate",
    "peft",
    "datasets",
    "safetensors",
    "numpy",
    "pydantic",
    "bilevel",
)
TINY = ("backend.dtype=float32", "problem.batch_size=4", "backend.micro_batch_size=2")
"""What is changed last in a dry run."""


@dataclass(frozen=True)
class Command:
    """A command to run. limit: seconds after which it is killed."""

    arguments: Sequence[str]
    limit: float = 240

    def __str__(self) -> str:
        return " ".join(self.arguments)


class Trial:
    """The commands of every section.

    output: where models and reports go. tiny: with a tiny model. processes: that a launcher starts.
    """

    def __init__(self, output: Path, *, tiny: bool, processes: int) -> None:
        self.output, self.tiny, self.processes = output, tiny, processes
        self.steps = "1" if tiny else "6"

    def machine(self) -> Iterator[Command]:
        """What there is, besides what `describe` says."""
        yield Command([sys.executable, "-m", "bilevel", "list"])

    def tests(self) -> Iterator[Command]:
        """A dry run only collects the tests that need a GPU."""
        yield Command([sys.executable, "-m", "bilevel", "check", "torch"])
        collect = ["--collect-only", "-q"] if self.tiny else []
        yield Command([sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu", *collect], limit=1200)

    def micro(self) -> Iterator[Command]:
        """One GPU and 1B."""
        model = self.model("1b")
        yield from self.made(model)
        for size in (2, 4, 8, 16):
            yield self.throughput(model, f"backend.micro_batch_size={size}")
        for change in ("backend.activation_checkpointing=false", "backend.deterministic=false", "active.name=all"):
            yield self.throughput(model, change)
        if not self.tiny:  # on a CPU, compiling takes minutes
            yield self.throughput(model, "backend.compile=true")

    def width(self) -> Iterator[Command]:
        """One GPU and some layers of larger models."""
        for size in ("8b-width", "32b-width"):
            model = self.model(size)
            yield from self.made(model)
            for rows in (2, 4, 8):
                yield self.throughput(model, f"backend.micro_batch_size={rows}")

    def backends(self) -> Iterator[Command]:
        """All GPUs and 1B."""
        model = self.model("1b")
        yield from self.made(model)
        for stage in range(4):
            yield self.throughput(model, "backend.name=deepspeed", f"backend.zero_stage={stage}", launched=True)
        yield self.throughput(model, "backend.name=fsdp", launched=True)
        yield self.throughput(model, "backend.name=deepspeed", "backend.offload_optimizer=true", launched=True)
        yield self.throughput(model, "backend.name=fsdp", "backend.offload_parameters=true", launched=True)

    def waits(self) -> Iterator[Command]:
        """1B."""
        model = self.model("1b")
        yield from self.made(model)
        yield self.python("idle.py", model)
        for name in ("deepspeed", "fsdp"):
            yield self.python("idle.py", model, f"backend.name={name}", launched=True)

    def model(self, size: str) -> Path:
        """Where the model of a size is."""
        return self.output / "models" / ("tiny" if self.tiny else size)

    def made(self, model: Path) -> Iterator[Command]:
        """What makes a model, if it is not there."""
        if not (model / "recipe.yaml").exists():
            yield Command([sys.executable, "-m", "benchmarks.random_models", str(model), model.name], limit=600)

    def throughput(self, model: Path, *changes: str, launched: bool = False) -> Command:
        """Measure a recipe."""
        return self.python("throughput.py", model, *changes, launched=launched, more=["--steps", self.steps])

    def python(self, script: str, model: Path, *changes: str, launched: bool = False, more: Sequence[str] = ()) -> Command:
        """Run a script of this folder on the recipe of a model."""
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.processes)]
        settings = [word for change in (*changes, *(TINY if self.tiny else ())) for word in ("--set", change)]
        first = [sys.executable, *(launcher if launched else []), "-m", f"benchmarks.{Path(script).stem}"]
        return Command([*first, str(model / "recipe.yaml"), *more, *settings])


SECTIONS = ("machine", "tests", "micro", "width", "backends", "waits")


def describe() -> str:
    """The versions and the devices of this machine."""
    lines = [f"python {platform.python_version()}, {platform.platform()}"]
    for name in PACKAGES:
        try:
            lines.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{name} is missing")
    if not torch.cuda.is_available():
        return "\n".join([*lines, "no GPU"])
    lines.append(f"CUDA {torch.version.cuda}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")  # type: ignore[no-untyped-call]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        lines.append(f"GPU {index}: {device.name}, {device.total_memory / 1e9:.1f} GB")
    return "\n".join(lines)


def run(command: Command, report: Path) -> bool:
    """Run a command, and write what it prints to the terminal and the report. Returns whether it succeeded."""
    print(f"\n$ {command}", flush=True)
    started = time.monotonic()
    process = subprocess.Popen(
        command.arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        printed, _ = process.communicate(timeout=command.limit)
        code = str(process.returncode)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # those that a launcher has started, too
        printed, _ = process.communicate()
        code = f"none: it was killed after {command.limit} s"
    printed = "\n".join(printed.splitlines()[-80:])
    print(printed, flush=True)
    with report.open("a") as file:
        end = f"exit code {code}, {time.monotonic() - started:.0f} s"
        file.write(f"\n```console\n$ {command}\n{printed}\n```\n\n{end}\n")
    return code == "0"


def main() -> None:
    """Run the sections. The exit code is the number of commands that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)}; all by default")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    unknown = set(options.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"unknown section {sorted(unknown)[0]}; there are {', '.join(SECTIONS)}")
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    report = output / "REPORT.md"
    trial = Trial(output, tiny=options.tiny, processes=torch.cuda.device_count() or 2)
    failed = []
    with report.open("a") as file:
        file.write(f"# Trial of {time.strftime('%Y-%m-%d %H:%M')}\n\n```text\n{describe()}\n```\n")
    print(describe())
    for section in options.sections or SECTIONS:
        with report.open("a") as file:
            file.write(f"\n## {section}\n")
        failed += [command for command in getattr(trial, section)() if not run(command, report)]
    print(f"\n{len(failed)} commands failed; the report is {report}", *failed, sep="\n  ")
    sys.exit(min(len(failed), 100))


if __name__ == "__main__":
    main()
