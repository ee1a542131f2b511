"""Launches processes, once for many cases: most of the time goes into starting them.

Tests that look at the same launch are in one file, so that one worker has all of them.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.warm.python import warm_python

ROOT = Path(__file__).parents[3]
LIMIT = 300  # seconds; a hang must not hold up the suite
NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


def launch(*arguments: str, cwd: Path, processes: int = 2, gpus: bool = False) -> "subprocess.CompletedProcess[str]":
    """Start processes with torchrun and wait for the end."""
    python = sys.executable if gpus else warm_python()
    command = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *arguments]
    more = {"PYTHON_EXEC": python, **({} if gpus else NO_GPU)}  # the former: what torchrun starts the processes with
    return subprocess.run(
        command, cwd=cwd, env=environment(**more), capture_output=True, text=True, timeout=LIMIT, check=False
    )


def alone(*arguments: str, cwd: Path, processes: int = 2) -> "list[subprocess.CompletedProcess[str]]":
    """Start processes as a launcher does, but without one, which would end all others as soon as one has ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    every = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes), **NO_GPU}
    started = [
        subprocess.Popen(
            [warm_python(), *arguments], cwd=cwd, env=environment(**every, RANK=str(rank), LOCAL_RANK=str(rank)),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(processes)
    ]  # fmt: skip
    said = [process.communicate(timeout=LIMIT) for process in started]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *words)
        for process, words in zip(started, said, strict=True)
    ]


def environment(**more: str) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "COLUMNS": "200",
        **more,
    }


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
