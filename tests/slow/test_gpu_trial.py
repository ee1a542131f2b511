"""The dry run of the trial for machines with GPUs."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_trial_runs_dry_without_a_failure(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu.py", "--tiny", "machine", "micro", "waits", "--output", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-3000:]
    assert (tmp_path / "REPORT.md").read_text().count("exit code 0") == 1 + 1 + 7 + 3
