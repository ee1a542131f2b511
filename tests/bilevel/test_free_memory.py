from pathlib import Path

import pytest

from bilevel.free_memory import free_memory


def system(root: Path, files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bilevel.free_memory._SYSTEM", root)
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


MACHINE = {"proc/meminfo": "MemTotal: 9000 kB\nMemFree: 1 kB\nMemAvailable: 4000 kB\n"}
JOB = "sys/fs/cgroup/slurm/job_7"
GROUPS = {
    "proc/self/cgroup": "1:name=systemd:/other\n0::/slurm/job_7/step_0\n",
    f"{JOB}/step_0/memory.max": "max\n",
    f"{JOB}/memory.max": "3000000\n",
    f"{JOB}/memory.current": "2500000\n",
    f"{JOB}/memory.stat": "anon 100000\ninactive_file 1000000\nactive_file 400000\n",
}


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, None),
        ({"proc/meminfo": "MemTotal: 9000 kB\n"}, None),
        (MACHINE, 4_096_000),
        ({**MACHINE, **GROUPS}, 1_900_000),
        ({**MACHINE, **GROUPS, f"{JOB}/memory.max": "max"}, 4_096_000),
        ({**MACHINE, "proc/self/cgroup": "4:memory:/old\n"}, 4_096_000),
    ],
)
def test_what_the_machine_and_the_job_have_left_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], free: int | None
) -> None:
    system(tmp_path, files, monkeypatch)
    assert free_memory() == free


def test_this_machine_tells() -> None:
    if Path("/proc/meminfo").exists():
        assert (free_memory() or 0) > 1e6
