"""A process that fails takes the others with it, says why, and loses nothing."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.bilevel_backends.distributed.conftest import NO_GPU, alone, environment, launch

SOON = 60  # seconds, most of which is the start of two processes; a hang would be cut off by the launch's own limit

RECIPE = """
from tests.bilevel_backends.distributed.cases import SOLVER, Sentences

recipe = {{
    "problem": Sentences({problem}),
    "solver": SOLVER,
    "backend": {{"name": {backend!r}, "dtype": "float32"}},
    "active": {{"name": "lisa", "blocks": 2, "period": 3}},
    "run": {{"steps": 200, "output": "out", "checkpoint_every": 2}},
}}
"""


def write(where: Path, problem: str = "", backend: str = "fsdp") -> None:
    (where / "recipe.py").write_text(RECIPE.format(problem=problem, backend=backend))


def codes(ended: "subprocess.CompletedProcess[str]") -> set[int]:
    """Exit codes of the processes, as the launcher reports those that are not 0."""
    return {int(code) for code in re.findall(r"exitcode\s*: (-?\d+)", ended.stderr)}


@pytest.mark.parametrize("backend", ["deepspeed", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_process_that_fails_says_why_and_ends_the_job(tmp_path: Path, backend: str) -> None:
    write(tmp_path, "crash=3", backend)
    started = time.monotonic()
    ended = launch("-m", "bilevel", "run", "recipe.py", cwd=tmp_path)
    assert time.monotonic() - started < SOON
    assert ended.returncode != 0
    assert "process 1 failed" in ended.stderr
    assert "this process fails on purpose" in ended.stderr
    assert 1 in codes(ended)
    assert (tmp_path / "out" / "checkpoints" / "step-00000002" / "run.json").exists()


def test_a_killed_process_ends_the_job(tmp_path: Path) -> None:
    write(tmp_path, "death=3")
    started = time.monotonic()
    ended = launch("-m", "bilevel", "run", "recipe.py", cwd=tmp_path)
    assert time.monotonic() - started < SOON
    assert ended.returncode != 0
    assert -9 in codes(ended)


def test_a_loss_that_is_not_finite_in_one_process_stops_all_with_the_step(tmp_path: Path) -> None:
    write(tmp_path, "poison=5", "deepspeed")
    ended = alone("-m", "bilevel", "run", "recipe.py", cwd=tmp_path)
    assert [process.returncode for process in ended] == [1, 1]
    assert "step 5: g(z) is nan" in ended[0].stderr


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        pytest.param(
            "rows=9",
            "a batch of 9 cannot be dealt evenly to 2 processes; choose a batch size that is a multiple of 2",
            marks=pytest.mark.slow,
        ),
        ("private=True", "the data of process 1 differs from that of process 0"),
    ],
)
def test_what_the_user_has_to_mend_ends_all_processes_with_code_2(tmp_path: Path, problem: str, words: str) -> None:
    write(tmp_path, problem)
    ended = alone("-m", "bilevel", "run", "recipe.py", cwd=tmp_path)
    assert words in " ".join(ended[0].stderr.split())
    assert sum(process.stderr.count("error: ") for process in ended) == 1
    assert [process.returncode for process in ended] == [2, 2]
    assert not (tmp_path / "out").exists()


def test_a_preempted_job_checkpoints_and_goes_on_with_resume(tmp_path: Path) -> None:
    """Launched as users do it, with nothing imported before."""
    write(tmp_path, "pause=0.05")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "-m", "bilevel", "run", "recipe.py", "--set", "run.checkpoint_every=1000"]  # fmt: skip
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment(**NO_GPU), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as job:
        metrics = tmp_path / "out" / "metrics.jsonl"
        while job.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) >= 4):
            time.sleep(0.1)
        job.send_signal(signal.SIGTERM)
        output, _ = job.communicate(timeout=SOON)
    assert "a checkpoint is in out; continue with --resume" in " ".join(output.split())
    done = int(re.findall(r"stopped after (\d+) of 200 steps", output)[0])
    again = launch("-m", "bilevel", "run", "recipe.py", "--set", f"run.steps={done + 2}", "--resume", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(done + 2))


def test_a_checkpoint_that_misses_a_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    made = alone("-m", "bilevel", "run", "recipe.py", "--set", "run.steps=2", cwd=tmp_path)
    assert [process.returncode for process in made] == [0, 0]
    lost = tmp_path / "out" / "checkpoints" / "step-00000002" / "z-00002-of-00002.safetensors"
    lost.unlink()
    ended = alone("-m", "bilevel", "run", "recipe.py", "--set", "run.steps=4", "--resume", cwd=tmp_path)
    assert "z-00002-of-00002.safetensors cannot be read: No such file or directory; no checkpoint in" in " ".join(
        ended[0].stderr.split()
    )
    assert [process.returncode for process in ended] == [2, 2]
