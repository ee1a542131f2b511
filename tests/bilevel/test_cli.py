"""The command as a user runs it: exit codes, messages, Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from bilevel import cli
from tests.warm.python import warm_python

RECIPE = """
from tests.conftest import Distance
from bilevel import SGD, ScaleBiO

recipe = {
    "problem": Distance(noise=0.2),
    "solver": ScaleBiO(penalty=5.0, lr_x=0.04, lr_z=0.3, optimizer_x=SGD(), optimizer_z=SGD(), warmup=2),
    "backend": {"name": "torch", "device": "cpu"},
    "run": {"steps": 30, "output": "out"},
}
"""
ROOT = Path(__file__).parents[2]


@pytest.fixture
def bilevel(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    (tmp_path / "recipe.py").write_text(RECIPE)

    def run(*arguments: str, python: str | None = None) -> subprocess.CompletedProcess[str]:
        command = [python or warm_python(), "-m", "bilevel.cli", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)

    return run


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])  # ours first, then what the tests run with
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


@pytest.mark.parametrize(
    ("settings", "spins"),
    [({}, cli.SPINS), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
    ids=["nothing settled", "spins", "policy"],
)
def test_threads_wait_briefly_unless_the_user_has_settled_how(
    settings: dict[str, str], spins: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch reads this when it is loaded, which is why the command line may not load it before."""
    environ, seen = dict(settings), []
    monkeypatch.setattr(os, "environ", environ)
    monkeypatch.setattr(cli, "app", lambda: seen.append(environ.get("GOMP_SPINCOUNT")))
    cli.main()
    assert seen == [spins]


@pytest.mark.parametrize("command", ["--version", "--help", "list"])
def test_the_command_line_does_not_load_torch_by_itself(command: str) -> None:
    """Loading it takes longer than all that such a command does."""
    code = (
        "import atexit, os, sys, bilevel.cli; atexit.register(lambda: os._exit('torch' in sys.modules)); bilevel.cli.main()"
    )
    subprocess.run([sys.executable, "-c", code, command], env=environment(), stdout=subprocess.DEVNULL, check=True)


def test_a_run_from_the_command_line_writes_its_directory_and_shows_every_step(bilevel, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    done = bilevel("run", "recipe.py", "--set", "run.steps=6", python=sys.executable)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\nstep ") == 6
    assert "upper variable held" in done.stdout
    assert "gap" in done.stdout
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "recipe.yaml", "working_directory.json", "metrics.jsonl", "account.json", "checkpoints", "tensorboard", "weights.png",
    }  # fmt: skip
    assert (tmp_path / "out" / "weights.png").read_bytes().startswith(b"\x89PNG")


def test_tensorboard_gets_every_number(bilevel, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert bilevel("run", "recipe.py", "--set", "run.steps=6").returncode == 0
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
    assert {"gap", "lower_loss", "upper_loss", "upper/x0"} <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("upper/x0")] == list(range(6))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "none.yaml"], "none.yaml cannot be read"),
        (["run", "recipe.py", "--set", "run.step=3"], "unknown key run.step; did you mean 'steps'?"),
        (["run", "recipe.py", "--set", "backend.name=torhc"], "did you mean 'torch'?"),
        (["run", "recipe.py", "--resume"], "no run to resume"),
        (["runn", "recipe.py"], "No such command 'runn'"),
    ],
)
def test_bad_input_ends_with_2_and_one_message(bilevel, arguments: list[str], message: str) -> None:  # type: ignore[no-untyped-def]
    done = bilevel(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_numbers_that_blow_up_end_with_1_and_no_traceback(bilevel, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "wild.py").write_text(RECIPE.replace("lr_z=0.3", "lr_z=1e9"))
    done = bilevel("run", "wild.py", "--set", "run.steps=400")
    assert done.returncode == 1
    assert "step " in done.stderr
    assert "finite" in done.stderr or "overflows" in done.stderr
    assert "Traceback" not in done.stderr


def test_list_shows_what_is_registered(bilevel) -> None:  # type: ignore[no-untyped-def]
    done = bilevel("list")
    assert done.returncode == 0
    for name in ("llm-reweighting", "scalebio", "torch"):
        assert name in done.stdout


def test_ctrl_c_saves_says_how_to_go_on_and_resume_ends_where_the_whole_run_does(bilevel, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    slow = RECIPE.replace("from bilevel import", "import time\nfrom bilevel import").replace(
        "recipe = {", "class Slow(Distance):\n    def summary(self, x):\n        time.sleep(0.05)\n        return super().summary(x)\n\nrecipe = {"
    ).replace('"problem": Distance', '"problem": Slow')  # fmt: skip
    (tmp_path / "slow.py").write_text(slow)
    assert bilevel("run", "slow.py", "--output", "whole").returncode == 0
    command = [sys.executable, "-m", "bilevel.cli", "run", "slow.py", "--output", "cut"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "cut" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 4):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "checkpoint is in cut; continue with --resume" in message
    assert "Traceback" not in message
    assert bilevel("run", "slow.py", "--output", "cut", "--resume").returncode == 0

    def last(run: str) -> object:
        return json.loads((tmp_path / run / "metrics.jsonl").read_text().splitlines()[-1])["upper"]

    assert last("cut") == last("whole")


def test_the_version_is_that_of_the_installed_package(bilevel: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    assert bilevel("--version", python=sys.executable).stdout == f"bilevel {version('bilevel')}\n"
