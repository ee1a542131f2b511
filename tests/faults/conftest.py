"""A process whose file system fails when a test says so; and where it does, few places in `make test`, all in `make soak`."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.bilevel_llm.conftest import data, make_problem, make_run, model_directory, tokenizer_only  # noqa: F401

HERE = Path(__file__).parent
IMPORTED = (
    "bilevel.cli", "bilevel.config", "bilevel.solvers.scalebio", "bilevel_backends.torch_backend", "bilevel_problems.quadratic",
    "bilevel_llm.finetuning.run", "bilevel_llm.finetuning.recipe", "bilevel_llm.mixing.draw", "bilevel_llm.reweighting.problem",
    "tensorboard.summary.writer.record_writer", "matplotlib.figure", "transformers.models.llama.modeling_llama",
)  # fmt: skip
FEW = 3  # faults of a command in `make test`, the same ones every time


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, or minus the signal; how many changes it made to files; what it said."""

    code: int
    changes: int
    said: str


Faulty = Callable[..., Ended]


@pytest.fixture(scope="session")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    """Runs a command of `bilevel`: faulty(root, *words, how="kill", at=3) kills it before its third change below `root`."""
    where = tmp_path_factory.mktemp("disk")
    library = where / "disk.so"
    subprocess.run(
        [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-O1", "-w", "-o", library, HERE / "disk.c", "-ldl"], check=True
    )
    environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "BILEVEL_CACHE": str(where / "cache")}
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.faults.server", *IMPORTED],
        cwd=HERE.parents[1], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert server.stdin is not None
    assert server.stdout is not None
    while server.stdout.readline() != "ready\n":  # what libraries print when they are imported comes first
        assert server.poll() is None

    def run(root: Path, *words: object, how: str = "count", at: int = 0) -> Ended:
        assert server.stdin is not None
        assert server.stdout is not None
        print(
            json.dumps({"words": list(map(str, words)), "root": str(root), "how": how, "at": at}),
            file=server.stdin,
            flush=True,
        )
        return Ended(**json.loads(server.stdout.readline()))

    with server:
        yield run
        server.stdin.close()


def places(changes: int, few: bool) -> list[int]:
    """The changes before which to fail: all, or some that are equally far apart."""
    return sorted({1 + i * (changes - 1) // (FEW - 1) for i in range(FEW)}) if few else list(range(1, changes + 1))
