"""A job of two processes that is killed while it writes a checkpoint goes on from the newest one that is whole."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.bilevel_backends.distributed.conftest import ROOT, launch

pytestmark = pytest.mark.soak
STEPS, SOON = 8, 120  # seconds

RECIPE = """
from tests.bilevel_backends.distributed.cases import SOLVER, Sentences

recipe = {{
    "problem": Sentences(),
    "solver": SOLVER,
    "backend": {backend},
    "active": {{"name": "lisa", "blocks": 2, "period": 3}},
    "run": {{"steps": {steps}, "output": "out", "checkpoint_every": 2, "keep_checkpoints": 3}},
}}
"""
BACKENDS = {
    "zero2": {"name": "deepspeed", "dtype": "float32", "zero_stage": 2},
    "fsdp": {"name": "fsdp", "dtype": "float32"},
}


def run(where: Path, *more: str) -> None:
    ended = launch("-m", "bilevel", "run", "recipe.py", *more, cwd=where)
    assert ended.returncode == 0, ended.stderr[-4000:]


def state(where: Path) -> dict[str, list[float]]:
    """The variables at the end, and the records without times."""
    last = where / "out" / "checkpoints" / f"step-{STEPS:08d}"
    found = {
        f"{file.name}/{name}": tensor.flatten().tolist()
        for file in sorted(last.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }
    lines = [json.loads(line) for line in (where / "out" / "metrics.jsonl").read_text().splitlines()]
    return found | {"upper": [value for line in lines for value in line["upper"].values()]}


def kill_in_checkpoint(where: Path, *, after: int) -> None:
    """Start the job and kill all of its processes as soon as a checkpoint later than step `after` is being written."""
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "-m", "bilevel", "run", "recipe.py"]  # fmt: skip
    checkpoints, limit = where / "out" / "checkpoints", time.monotonic() + SOON
    job = subprocess.Popen(
        command, cwd=where, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    whole = checkpoints / f"step-{after:08d}"
    try:
        while not (whole.is_dir() and list(checkpoints.glob(".*.part"))):
            assert job.poll() is None, "the job ended before it was killed"
            assert time.monotonic() < limit
            time.sleep(0.001)
    finally:
        os.killpg(job.pid, signal.SIGSTOP)  # the workers have sessions of their own, and end with their launcher
        for pid in children(job.pid):
            os.kill(pid, signal.SIGKILL)
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()


def children(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            facts = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(facts[1]) == pid:
            found.append(int(entry.parent.name))
    return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_job_killed_in_a_checkpoint_goes_on_and_ends_as_if_it_had_not_been(backend: str, tmp_path: Path) -> None:
    whole, killed, damaged = (tmp_path / name for name in ("whole", "killed", "damaged"))
    for where in (whole, killed):
        where.mkdir()
        (where / "recipe.py").write_text(RECIPE.format(backend=BACKENDS[backend], steps=STEPS))
    run(whole)
    kill_in_checkpoint(killed, after=4)
    shutil.copytree(killed, damaged)
    run(killed, "--resume")
    assert state(killed) == state(whole)
    assert list(killed.rglob(".*")) == []

    newest = max((damaged / "out" / "checkpoints").glob("step-*"))
    assert newest.name >= "step-00000004"
    shard = newest / "z-00002-of-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    run(damaged, "--resume")
    assert state(damaged) == state(whole)
    assert (newest.parent / f"damaged-{newest.name}").is_dir()
