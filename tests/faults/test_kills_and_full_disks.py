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

from bilevel.plain import to_plain
from tests.faults.conftest import Ended, Faulty, places

SOAK = pytest.mark.soak
ALL = ("run", "finetune", "mix", "baseline", "compare", "export-model", "export-weights")
TRIED = [  # command, how it fails, at some places or at all
    ("run", "kill", True),
    ("mix", "kill", True),
    ("export-weights", "kill", True),
    *(pytest.param(command, how, False, marks=SOAK) for command in ALL for how in ("kill", "tear")),
]
FILLED = [
    ("run", True),
    ("mix", True),
    *(pytest.param(command, False, marks=SOAK) for command in ALL),
]

DONE = ("exists, and nothing is overwritten", "already exists and is not overwritten", "holds another run")


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
    if request.param in ("finetune", "export-model"):
        model = request.getfixturevalue("model_directory")()
        rows = request.getfixturevalue("data")
        tuning = ["finetune", "--model", model, "--data", rows["clean"], "--validation", rows["target"], "--steps", 2,
                  "--max-length", 32, "--batch-size", 4, "--set", "backend.device=cpu", "--output"]  # fmt: skip
        if request.param == "finetune":
            return Command([*map(str, tuning), str(tmp_path / "out")], ["--resume"], finetuned)
        tuned = request.getfixturevalue("faulty")(tmp_path / "tuned", *tuning, tmp_path / "tuned")
        assert tuned.code == 0, tuned.said
        return Command(["export-model", str(tmp_path / "tuned"), str(tmp_path / "out" / "model")], None, files)
    if request.param == "compare":
        model = request.getfixturevalue("model_directory")()
        rows = request.getfixturevalue("data")
        recipe = {
            "problem": {
                "name": "llm-reweighting", "model": str(model), "max_length": 32, "batch_size": 3,
                "sources": [{"name": name, "path": rows[name]} for name in ("clean", "noise")],
                "validation": [{"path": rows["target"]}],
            },
            "solver": {"name": "scalebio", "warmup": 1},
            "backend": {"name": "torch", "device": "cpu"},
            "run": {"steps": 2, "output": str(tmp_path / "out"), "checkpoint_every": 1},
            "compare": {
                "methods": ["learned"], "seeds": [0], "rows": 8, "finetune": {"lr": 1e-2, "batch_size": 8},
                "test": [{"name": "other", "path": rows["other"]}],
            },
        }  # fmt: skip
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return Command(["compare", str(tmp_path / "recipe.yaml")], None, compared)
    if request.param == "baseline":
        problem = to_plain(request.getfixturevalue("make_problem")())
        model = str(request.getfixturevalue("model_directory")())
        recipe = {
            "problem": {"name": "llm-reweighting", **problem, "model": model, "batch_size": 3},
            "backend": {"name": "torch", "device": "cpu"},
            "run": {"steps": 1, "output": str(tmp_path / "out")},
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return Command(["baseline", "proportional", str(tmp_path / "recipe.yaml")], None, files)
    run = request.getfixturevalue("make_run")()
    if request.param == "export-weights":
        words = ["export-weights", run, "--to", "llamafactory", "--output", tmp_path / "out" / "weights"]
    else:
        words = ["mix", run, "--rows", 20, "--output", tmp_path / "out" / "mix.jsonl"]
    return Command(list(map(str, words)), None, files)


def files(output: Path) -> dict[str, bytes]:
    """What is there, other than hidden files such as the lock of a process that is gone."""
    names = {str(path.relative_to(output)): path for path in sorted(output.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in names.items() if not name.startswith(".") and "/." not in name}


def compared(output: Path) -> Any:
    (cell,) = output.glob("cells/learned/seed-*")
    names = ("mix.jsonl", "scores.json", "rows-other.npz")
    return [(cell / name).read_bytes() for name in names], json.loads((cell / "weights.json").read_text())["weights"]


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
            # killed when it had done everything: what is refused changes nothing, not even the lock of the one who is gone
            done = any(words in ended.said for words in DONE)
            assert ended.code == (2 if done else 0), (at, ended.said)
        assert command.state(out) == expected, at
        if not done:
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
