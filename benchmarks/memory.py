"""The plan's memory beside what a real run takes: peak of torch's allocations, and of the whole process, on the CPU.

Every case makes a small random Llama and rows that fill `max_length` with labels everywhere, runs steps of ScaleBiO on the
torch backend in a process of its own, and compares. Two peaks are taken, as either alone could mislead:

- torch: what torch's own allocator held, from its profiler's record of every allocation. This is what a plan is about.
- process: the process's resident memory above what it had before the model was made, with glibc told to hand memory back
  at once. It also has what torch does not count: kernels' scratch space and threads.

The plan is taken without its reserve for CUDA, which a CPU has not.

Usage: python benchmarks/memory.py [--case NAME]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROWS = 4


@dataclass(frozen=True)
class Case:
    """One setting.

    blocks: of LISA; None trains everything. micro: rows of a forward; None takes the whole batch. rank: of adapters, which
    then train instead of the weights; 0: there are none.
    """

    blocks: int | None = 2
    dtype: str = "bfloat16"
    checkpointing: bool = False
    micro: int | None = None
    length: int = 128
    tied: bool = False
    rank: int = 0
    hidden: int = 512
    layers: int = 8
    vocabulary: int = 8192

    def __str__(self) -> str:
        trained = "all" if self.blocks is None else f"{self.blocks} blocks"
        return ", ".join(
            [trained, self.dtype, f"micro {self.micro or ROWS}", f"length {self.length}"]
            + ["checkpointing"] * self.checkpointing
            + ["tied"] * self.tied
            + [f"adapters of rank {self.rank}"] * bool(self.rank)
        )


CASES = [
    Case(),
    Case(checkpointing=True),
    Case(blocks=None),
    Case(blocks=None, checkpointing=True),
    Case(dtype="float32"),
    Case(blocks=None, dtype="float32"),
    Case(blocks=None, dtype="float32", checkpointing=True),
    Case(micro=1),
    Case(blocks=None, dtype="float32", micro=1),
    Case(length=512),
    Case(length=512, checkpointing=True),
    Case(length=512, dtype="float32", micro=2),
    Case(blocks=4, tied=True),
    Case(blocks=None, rank=16, dtype="float32"),
    Case(blocks=None, rank=16, dtype="float32", checkpointing=True),
]


def problem(case: Case, directory: Path) -> Any:
    """A reweighting problem whose rows are full; makes its model and data."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=raw).save_pretrained(directory)
    config = LlamaConfig(
        hidden_size=case.hidden,
        num_hidden_layers=case.layers,
        vocab_size=case.vocabulary,
        intermediate_size=case.hidden * 8 // 3,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=case.tied,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=getattr(torch, case.dtype)).save_pretrained(directory)
    for name in ("a", "b", "target"):
        rows = [{"text": f"{name}{i} " * case.length} for i in range(ROWS)]
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return reweighting(case, directory)


def reweighting(case: Case, directory: Path) -> Any:
    """The problem of model and data that `problem` has made."""
    from bilevel_llm.data.settings import Source, ValidationSet
    from bilevel_llm.model.lora import LoRA
    from bilevel_llm.reweighting.problem import LLMReweighting

    return LLMReweighting(
        model=str(directory),
        sources=[Source(name, str(directory / f"{name}.jsonl")) for name in ("a", "b")],
        validation=[ValidationSet(str(directory / "target.jsonl"))],
        max_length=case.length,
        batch_size=ROWS,
        lora=LoRA(case.rank) if case.rank else None,
    )


def planned(case: Case, problem: Any) -> int:
    """Bytes of the plan, without what only a GPU takes."""
    from bilevel import ScaleBiO
    from bilevel.planning.footprint import Footprint
    from bilevel.planning.hardware import Hardware
    from bilevel.planning.load import Setup
    from bilevel.planning.plan import make_plan

    backend, active = parts(case)
    setup = Setup(backend, active, ScaleBiO().workload(), seed=0, steps=3)
    plan = make_plan(Footprint(problem.cost(), case.dtype), setup, Hardware(context=0, fragmentation=0))
    return plan.gpu_bytes


def parts(case: Case, device: str = "cpu") -> tuple[Any, Any]:
    """Backend and active rule of a case."""
    from bilevel import LISA, All
    from bilevel_backends.torch_backend import TorchBackend

    backend = TorchBackend(
        device=device,
        dtype=case.dtype,  # type: ignore[arg-type]
        micro_batch_size=case.micro,
        activation_checkpointing=case.checkpointing,
    )
    return backend, All() if case.blocks is None else LISA(blocks=case.blocks)


class Steps:
    """Steps of ScaleBiO with the heaviest draw of the rule."""

    def __init__(self, case: Case, problem: Any, device: str = "cpu") -> None:
        from bilevel import ScaleBiO
        from bilevel_backends.variable import ModuleVariable

        self.problem, self.solver = problem, ScaleBiO(warmup=0)
        self.backend, rule = parts(case, device)
        self.backend.start(seed=0)
        self.state = self.solver.init(problem, self.backend)
        for replica in self.state.replicas.values():
            assert isinstance(replica, ModuleVariable)
            blocks = replica.blocks
            sizes = {b: sum(replica.parameter(n).numel() for n in names) for b, names in blocks.members.items()}
            self.backend.activate(replica, rule.heaviest(blocks, sizes)[0])

    def run(self, steps: int) -> None:
        """Moments exist from the second step on."""
        for t in range(steps):
            self.solver.step(t, self.state, self.problem, self.backend)
        self.backend.close()


def torch_peak(case: Case, problem: Any) -> int:
    """Most bytes that torch held at a time: parameters as they stand, and what the profiler sees allocated on top."""
    from bilevel_backends.variable import ModuleVariable

    steps = Steps(case, problem)
    seen: dict[int, int] = {}
    for replica in steps.state.replicas.values():
        assert isinstance(replica, ModuleVariable)
        for tensor in [*replica.module.parameters(), *replica.masters.values()]:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return peak_of(lambda: steps.run(2), sum(seen.values()))


def peak_of(work: Callable[[], None], live: int) -> int:
    """Most bytes that torch holds at a time while it works; `live`: what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    peak = live
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def process_peak(case: Case, problem: Any) -> int:
    """Growth of the process's largest resident size, from before the model is made."""
    problem.prepare()
    Path("/proc/self/clear_refs").write_text("5")  # forget the largest size so far
    before = _status("VmRSS")
    Steps(case, problem).run(2)
    return _status("VmHWM") - before


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def measure(case: Case, kind: str) -> dict[str, int]:
    """Peak of one kind, and the plan for it, in this process."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        p = problem(case, Path(directory))
        if kind == "process":
            return {"process": process_peak(case, p)}
        return {"torch": torch_peak(case, p), "plan": planned(case, p)}


def compare(number: int) -> dict[str, int]:
    """Plan and both peaks of one case, each in a process of its own."""
    found: dict[str, int] = {}
    for kind in ("torch", "process"):
        command = [sys.executable, __file__, "--case", str(number), "--kind", kind]
        # a fixed threshold: freed tensors go back to the system at once, so that resident memory is what is held
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        found |= json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Run every case and print a line of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=int, help="one case alone, by number from 0")
    parser.add_argument("--kind", choices=["torch", "process"], help="measure it in this process, print JSON")
    options = parser.parse_args()
    if options.kind:
        print(json.dumps(measure(CASES[options.case], options.kind)))
        return
    print(f"{'case':<52} {'plan':>8} {'torch':>8} {'ratio':>6} {'process':>8} {'ratio':>6}  (MB)")
    for number in range(len(CASES)) if options.case is None else [options.case]:
        found = compare(number)
        ratios = {kind: found["plan"] / found[kind] for kind in ("torch", "process")}
        print(
            f"{CASES[number]!s:<52} {found['plan'] / 1e6:8.1f} {found['torch'] / 1e6:8.1f} {ratios['torch']:6.3f} "
            f"{found['process'] / 1e6:8.1f} {ratios['process']:6.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
