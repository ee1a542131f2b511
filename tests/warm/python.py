"""A Python interpreter that has everything imported: most of the time of a short program goes into imports."""

import atexit
import functools
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
IMPORTED = (
    "bilevel.cli", "bilevel.config", "bilevel.loop", "bilevel.solvers.scalebio", "bilevel.solvers.rounds",
    "bilevel_backends.deepspeed_backend", "bilevel_backends.fsdp_backend", "bilevel_backends.torch_backend",
    "bilevel_llm.finetuning.problem", "bilevel_llm.reweighting.problem", "bilevel_problems.quadratic",
    "matplotlib.figure", "peft", "tensorboard.summary.writer.record_writer", "torch.distributed.run",
)  # fmt: skip


@functools.cache
def warm_python() -> str:
    """A program that takes `-m MODULE ARGUMENTS` or `FILE ARGUMENTS`, as python does. It sees no GPU."""
    folder = Path(tempfile.mkdtemp(prefix="warm-"))  # short: the address of a socket has 100 characters at most
    address, python = folder / "socket", folder / "python"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
    }
    server = subprocess.Popen(
        [sys.executable, HERE / "server.py", address, *IMPORTED],
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    atexit.register(server.communicate)  # closes its stdin, at which it ends
    assert server.stdout is not None
    while server.stdout.readline() != "ready\n":  # what libraries print when they are imported comes first
        assert server.poll() is None
    python.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, "-IS", str(HERE / "client.py"), str(address)])} "$@"\n')
    python.chmod(0o755)
    return str(python)
