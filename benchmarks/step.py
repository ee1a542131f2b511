"""Seconds and peak memory of one ScaleBiO step on a real small LLM, beside a plain PyTorch loop that does the same.

Both do the three passes of a step (lower loss of z, lower loss of y, upper loss of y) and two AdamW steps, on the same
rows, with the same two of thirty blocks trained, in bfloat16. The plain loop is what one writes first: padded batches with
an attention mask, `AutoModelForCausalLM` with `labels=`, logits at every position.

Each case runs in processes of its own, in turn (a, b, a, b, ...), so that a change in the machine's speed hits both.

Usage: python benchmarks/step.py [--steps 6] [--rounds 3] [--dtype bfloat16]
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

ROWS, BATCH, MICRO, LENGTH, BLOCKS = 64, 8, 4, 128, (9, 20)


def rows(offset: int) -> list[dict[str, str]]:
    """Instruction rows of 30 to 100 words, of which the last third is the answer."""
    words = " ".join(topics[name] for name in sorted(topics)).replace("*", "").split()
    made = []
    for i in range(ROWS):
        start = (offset * ROWS + i) * 110
        part = words[start : start + 30 + (i * 37) % 71]
        cut = 2 * len(part) // 3
        made.append({"instruction": " ".join(part[:cut]), "input": "", "output": " ".join(part[cut:])})
    return made


def problem(directory: Path) -> Any:
    """The reweighting problem of both cases."""
    from bilevel_llm.data.settings import Source, ValidationSet
    from bilevel_llm.reweighting.problem import LLMReweighting

    for offset, name in enumerate(("a", "b", "validation")):
        (directory / f"{name}.json").write_text(json.dumps(rows(offset)))
    return LLMReweighting(
        model="smollm2-135m",
        sources=[Source(name, str(directory / f"{name}.json")) for name in ("a", "b")],
        validation=[ValidationSet(str(directory / "validation.json"))],
        max_length=LENGTH,
        batch_size=BATCH,
    )


def ours(directory: Path, dtype: str) -> Callable[[int], None]:
    """A step of this library."""
    from bilevel import ScaleBiO
    from bilevel_backends.torch_backend import TorchBackend

    p, solver = problem(directory), ScaleBiO(warmup=0)
    backend = TorchBackend(dtype=dtype, micro_batch_size=MICRO)  # type: ignore[arg-type]
    backend.start(seed=0)
    state = solver.init(p, backend)
    for replica in state.replicas.values():
        backend.activate(replica, frozenset(replica.blocks.repeated[i] for i in BLOCKS))

    def step(t: int) -> None:
        solver.step(t, state, p, backend)

    return step


def plain(directory: Path, dtype: str) -> Callable[[int], None]:
    """The same in a plain loop."""
    from transformers import AutoModelForCausalLM

    p = problem(directory)
    models = [AutoModelForCausalLM.from_pretrained(p._files.path, dtype=getattr(torch, dtype)) for _ in "yz"]
    for model in models:
        model.requires_grad_(False)
        for i in BLOCKS:
            model.model.layers[i].requires_grad_(True)
    optimizers = [torch.optim.AdamW((q for q in model.parameters() if q.requires_grad), lr=1e-5) for model in models]
    logits = torch.zeros(2, requires_grad=True)

    def batches(tables: Any, sampler: Any, t: int) -> list[tuple[Any, int]]:
        picked = [tables[source].row(row) for source, row in sampler.batch(t, 0)]
        out = []
        for start in range(0, BATCH, MICRO):
            part = picked[start : start + MICRO]
            longest = max(len(ids) for ids, _ in part)
            ids, mask = torch.zeros(MICRO, longest, dtype=torch.long), torch.zeros(MICRO, longest, dtype=torch.long)
            labels = torch.full((MICRO, longest), -100)
            for i, (tokens, marked) in enumerate(part):
                ids[i, : len(tokens)], mask[i, : len(tokens)] = torch.from_numpy(tokens), 1
                labels[i, : len(tokens)] = torch.where(torch.from_numpy(marked), ids[i, : len(tokens)], -100)
            out.append(({"input_ids": ids, "attention_mask": mask, "labels": labels}, start // MICRO))
        return out

    def step(t: int) -> None:
        lower = batches(list(p._train.values()), p._lower_sampler, t)
        upper = batches(list(p._targets.values()), p._upper_sampler, t)
        y, z = models
        for model, data, scale, weighted in ((z, lower, -10.0, True), (y, lower, 10.0, True), (y, upper, 1.0, False)):
            for batch, source in data:
                weight = torch.softmax(logits, 0)[source] if weighted else 0.5
                (scale * weight * model(**batch).loss).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step


def measure(case: str, steps: int, dtype: str) -> dict[str, float]:
    """Median seconds of a step after a first one, and the process's peak memory."""
    with tempfile.TemporaryDirectory() as directory:
        step = {"ours": ours, "plain": plain}[case](Path(directory), dtype)
        step(0)
        seconds = []
        for t in range(1, steps + 1):
            started = time.perf_counter()
            step(t)
            seconds.append(time.perf_counter() - started)
    return {"seconds": median(seconds), "gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}


def main() -> None:
    """Run both cases in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--case", choices=["ours", "plain"], help="measure one case in this process and print JSON")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.case, options.steps, options.dtype)))
        return
    found: dict[str, list[dict[str, float]]] = {"ours": [], "plain": []}
    for _ in range(options.rounds):
        for case, results in found.items():
            command = [sys.executable, __file__, "--case", case, "--steps", str(options.steps), "--dtype", options.dtype]
            results.append(
                json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
            )
    table = Table(
        "case", "seconds a step", "peak GB", title=f"{options.dtype}, batch {BATCH}, length {LENGTH}, 2 of 30 blocks"
    )
    for case, results in found.items():
        table.add_row(case, *(f"{median(r[key] for r in results):.2f}" for key in ("seconds", "gigabytes")))
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(found["plain"], found["ours"], strict=True)]
    Console().print(table)
    print(f"plain / ours, round by round: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")


if __name__ == "__main__":
    main()
