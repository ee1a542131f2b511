"""What stands in for an interpreter behaves as one."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.warm.python import warm_python

Start = Callable[..., "subprocess.Popen[str]"]

PROGRAM = """
import os, sys, time
print(sys.argv[1:], os.getcwd(), os.environ.get("SAID"), __name__)
print("wrong", file=sys.stderr)
exec(sys.argv[1])
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    (tmp_path / "program.py").write_text(PROGRAM)
    with ExitStack() as programs:

        def start(code: str, python: str, **environment: str) -> "subprocess.Popen[str]":
            program = subprocess.Popen(
                [python, "program.py", code], cwd=tmp_path, env={**os.environ, **environment},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            return programs.enter_context(program)

        yield start


@pytest.mark.parametrize(
    "code",
    ["", "sys.exit(3)", "sys.exit('a message')", "import atexit; atexit.register(print, 'the end')", "print(input())"],
    ids=["to the end", "exit code", "message", "registered", "stdin"],
)
def test_a_program_sees_and_says_what_it_would_in_an_interpreter(code: str, start: Start) -> None:
    warm, cold = (start(code, python, SAID="this") for python in (warm_python(), sys.executable))
    assert warm.communicate("given\n", timeout=60) == cold.communicate("given\n", timeout=60)
    assert warm.returncode == cold.returncode


def test_an_error_ends_it_with_its_traceback(start: Start) -> None:
    program = start("1 / 0", warm_python())
    _, said = program.communicate(timeout=60)
    assert program.returncode == 1
    assert said.endswith("ZeroDivisionError: division by zero\n")


def test_a_program_finds_nothing_that_an_earlier_one_left(start: Start) -> None:
    for _ in range(2):
        program = start("import torch; print(getattr(torch, 'left', None)); torch.left = 1", warm_python())
        assert program.communicate(timeout=60)[0].splitlines()[-1] == "None"


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_program(sent: signal.Signals, start: Start) -> None:
    code = f"import signal; signal.signal({int(sent)}, lambda *_: sys.exit(7)); print('ready', flush=True); time.sleep(60)"
    program = start(code, warm_python())
    assert program.stdout is not None
    while program.stdout.readline() != "ready\n":
        assert program.poll() is None
    program.send_signal(sent)
    assert program.wait(timeout=60) == 7


def test_a_program_that_is_killed_is_gone_and_so_is_what_stood_for_it(start: Start) -> None:
    program = start("os.kill(os.getpid(), 9)", warm_python())
    assert program.wait(timeout=60) == -signal.SIGKILL


def test_who_kills_what_stands_for_a_program_kills_the_program(start: Start, tmp_path: Path) -> None:
    program = start("open('lock', 'w').write(str(os.getpid())); print('ready', flush=True); time.sleep(60)", warm_python())
    assert program.stdout is not None
    while program.stdout.readline() != "ready\n":
        assert program.poll() is None
    program.kill()
    assert program.stdout.read() == ""  # its end is that of the last process that could write to it
    assert program.wait(timeout=60) == -signal.SIGKILL
