"""Commands are killed before a change to a file, in the middle of a write, and have their disk filled from a change on.

Some places in `make test`, all of them in `make soak`.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.bilevel_llm.conftest import data, make_problem, make_run, model_directory, tokenizer_only  # noqa: F401
from tests.faults.conftest import Ended, Faulty, places

SOAK = pytest.mark.soak
TRIED = [  # command, how it fails, at some places or at all
    ("run", "kill", True),
    ("mix", "kill", True),
    *(pytest.param(command, how, False, marks=SOAK) for command in ("run", "finetune", "mix") for how in ("kill", "tear")),
]
FILLED = [
    ("run", True),
    ("mix", True),
    *(pytest.param(command, False, marks=SOAK) for command in ("run", "finetune", "mix")),
]


@dataclass
class Command:
    """A command that is tried.

    words: of the command; `resume`: what a person adds to go on with it.
    state: what must be the same in the end, whatever happened before.
    """

    words: list[str]
    resume: list[str] | None
    state: Callable[[Path], Any]


def steps(output: Path) -> list[dict[str, Any]]:
    """The records, without times."""
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def checkpoint(output: Path) -> dict[str, bytes]:
    last = max((output / "checkpoints").glob("step-*"))
    return {file.name: file.read_bytes() for file in last.glob("*.safetensors")}


@pytest.fixture
def command(request: pytest.FixtureRequest, tmp_path: Path) -> Command:
    if request.param == "run":
        recipe = {
            "problem": {"name": "quadratic"},
            "solver": {"name": "scalebio", "warmup": 1},
            "backend": {"name": "torch", "device": "cpu"},
            "run": {"steps": 4, "checkpoint_every": 1, "keep_checkpoints": 1, "output": str(tmp_path / "out")},
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return Command(["run", str(tmp_path / "recipe.yaml")], ["--resume"], lambda out: (steps(out), checkpoint(out)))
    if request.param == "finetune":
        model = request.getfixturevalue("model_directory")()
        rows = request.getfixturevalue("data")
        words = ["finetune", "--model", model, "--data", rows["clean"], "--validation", rows["target"], "--steps", 2,
                 "--max-length", 32, "--batch-size", 4, "--set", "backend.device=cpu", "--output", tmp_path / "out"]  # fmt: skip
        return Command(list(map(str, words)), ["--resume"], finetuned)
    run = request.getfixturevalue("make_run")()
    words = ["mix", run, "--rows", 20, "--output", tmp_path / "out" / "mix.jsonl"]
    return Command(list(map(str, words)), None, lambda out: [path.read_bytes() for path in sorted(out.iterdir())])


def finetuned(output: Path) -> Any:
    return steps(output), (output / "model" / "model.safetensors").read_bytes(), (output / "evaluation.json").read_bytes()


def again(faulty: Faulty, command: Command, root: Path) -> Ended:
    """What a person does: go on, or start again if there is nothing yet to go on with."""
    if command.resume is not None:
        ended = faulty(root, *command.words, *command.resume)
        if "no run to resume" not in ended.said:
            return ended
    return faulty(root, *command.words)


def assert_clean(root: Path) -> None:
    assert [path for path in root.rglob(".*")] == []


@pytest.mark.parametrize(("command", "how", "few"), TRIED, indirect=["command"])
def test_a_command_that_is_killed_can_be_given_again_and_ends_as_if_nothing_had_been(
    command: Command, how: str, few: bool, faulty: Faulty, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    whole = faulty(out, *command.words)
    assert whole.code == 0, whole.said
    expected = command.state(out)
    for at in places(whole.changes, few):
        shutil.rmtree(out)
        killed = faulty(out, *command.words, how="tear" if few and at % 2 else how, at=at)
        assert killed.code in (-9, 0), killed.said
        done = False
        if killed.code == -9:
            ended = again(faulty, command, out)
            done = "exists, and nothing is overwritten" in ended.said  # killed when it had done everything
            assert ended.code == (2 if done else 0), (at, ended.said)
        assert command.state(out) == expected, at
        assert_clean(out)


@pytest.mark.parametrize(("command", "few"), FILLED, indirect=["command"])
def test_a_full_disk_is_said_in_a_line_and_the_command_goes_on_when_there_is_room(
    command: Command, few: bool, faulty: Faulty, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    whole = faulty(out, *command.words)
    assert whole.code == 0, whole.said
    expected = command.state(out)
    for at in places(whole.changes, few):
        shutil.rmtree(out)
        full = faulty(out, *command.words, how="full", at=at)
        assert "Traceback" not in full.said, (at, full.said)
        if full.code == 0:  # what was not written was a picture
            continue
        assert full.code == 1, (at, full.said)
        assert "No space left on device" in full.said, (at, full.said)
        ended = again(faulty, command, out)
        assert ended.code == 0, (at, ended.said)
        assert command.state(out) == expected, at
        assert_clean(out)
