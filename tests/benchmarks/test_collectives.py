"""A step sends few and large messages: what `benchmarks/collectives.py` counts does not grow."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.warm.python import warm_python

ROOT = Path(__file__).parents[2]

MOST = {  # all-gathers, reduce-scatters, all-reduces
    "zero0": (0, 0, 8),  # the loss of each of three passes; gradients of two layers of y and z, and of x
    "zero1": (4, 4, 6),  # instead: shards of the gradients and of the new parameters; norms of y and z
    "zero2": (4, 12, 6),  # gradients of two layers in three passes of two micro-batches
    "zero2, once a step": (4, 4, 6),
    "zero3": (168, 12, 6),  # embedding, head and twelve layers, forward and backward
    "zero3, once a step": (168, 4, 6),
    "fsdp": (
        144,
        12,
        6,
    ),  # embedding, head, what is left and twelve layers; eight down to the lowest that trains, and the next
    "fsdp, once a pass": (144, 6, 6),
}


def test_a_step_sends_no_more_messages_than_it_needs(tmp_path: Path) -> None:
    file = tmp_path / "counts.json"
    environment = {**os.environ, "PYTHON_EXEC": warm_python(), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}  # fmt: skip
    command = [sys.executable, str(ROOT / "benchmarks" / "collectives.py"), "--json", str(file)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(file.read_text())
    for name, most in MOST.items():
        counts = found[name]["all"]
        assert counts.get("other", 0) == 0, name
        for kind, limit in zip(("all-gather", "reduce-scatter", "all-reduce"), most, strict=True):
            assert counts.get(kind, 0) <= limit, f"{name}: {counts}"
    gathers = {name: found[name]["all"]["all-gather"] for name in ("zero3", "zero3, small bucket")}
    assert gathers["zero3"] < 0.6 * gathers["zero3, small bucket"], "DeepSpeed's buckets do not fit the model's blocks"
