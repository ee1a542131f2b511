"""Launches processes, once for many cases: most of the time goes into starting them.

Tests that look at the same launch are in one file, so that one worker has all of them.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.warm.python import warm_python

ROOT = Path(__file__).parents[3]
LIMIT = 300  # seconds; a hang must not hold up the suite


def launch(*arguments: str, cwd: Path, processes: int = 2, gpus: bool = False) -> "subprocess.CompletedProcess[str]":
    """Start processes with torchrun and wait for the end."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "COLUMNS": "200",
        **({} if gpus else {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}),
    }
    python = sys.executable if gpus else warm_python()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "--no-python"]
    command = [python, *launcher, python, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False)


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Case of worker.py -> the directory with what it found, after a launch that must succeed."""
    done: dict[str, Path] = {}

    def results(case: str, prepare: Callable[[Path], None] = lambda where: None, processes: int = 2) -> Path:
        if case not in done:
            where = tmp_path_factory.mktemp(case)
            prepare(where)
            ended = launch(str(Path(__file__).with_name("worker.py")), case, str(where), cwd=where, processes=processes)
            assert ended.returncode == 0, ended.stderr[-6000:]
            done[case] = where
        return done[case]

    return results
