"""What a run comes to is said once, with the commands that make sense then, as they have to be typed."""

import io
import json
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bilevel import Record, Run
from bilevel.account import HERE, RUN, Account, NextStep, Verdict
from bilevel.answer import account_of, answer_of, command_line, in_words
from bilevel.history import History
from bilevel.run_reader import read_run
from tests.conftest import Distance

LONGER = Verdict("run longer", "3 rounds are few", 72)
USE = Verdict("use", "it is good")
BAD = Verdict("do not use", "the loss rises")
NAMED = {section: {"name": "a"} for section in ("problem", "solver", "backend")}


class Deciding(Distance):
    decided: Verdict | None = None

    def verdict(self, history: Sequence[Record]) -> Verdict | None:
        return self.decided

    def next_steps(self, history: Sequence[Record]) -> Sequence[NextStep]:
        return [NextStep("mix", ("mix", RUN, f"{HERE}data/a b.jsonl"))] if self.decided == USE else []


def run(
    verdict: Verdict | None, *, done: int = 40, steps: int = 40, recipe: Any = NAMED, output: str | None = "my run"
) -> Run:
    problem = Deciding()
    problem.decided = verdict
    history = History(Record(t, 6.0, {"a": 0.25, "b": 0.75}) for t in range(done))
    where = None if output is None else Path(output)
    parts: Any = (None, None, None)
    return Run(problem, *parts, steps, 0, where, recipe, history=history)


REPORT = "bilevel report 'my run'"


@pytest.mark.parametrize(
    ("made", "lines"),
    [
        (run(LONGER), ["bilevel run --resume 'my run' --set run.steps=72", REPORT]),
        (
            run(LONGER, recipe={**NAMED, "run": {"steps": "auto"}}),
            ["bilevel run --resume 'my run' --set run.at_most=72", REPORT],
        ),
        (run(LONGER, done=20, steps=80), ["bilevel run --resume 'my run'", REPORT]),
        (run(None, done=20), ["bilevel run --resume 'my run'", REPORT]),
        (run(None), [REPORT]),
        (run(USE), ["mix 'my run' 'data/a b.jsonl'", REPORT]),
        (run(BAD), [REPORT]),
        (run(LONGER, recipe={"problem": {"class": "x"}}), [REPORT]),
        (run(USE, output=None), []),
    ],
    ids=["longer", "longer, auto", "longer, stopped", "stopped", "done", "use", "do not use", "made in Python", "not saved"],
)
def test_the_commands_are_those_that_make_sense_after_the_verdict(made: Run, lines: list[str]) -> None:
    assert [command.line for command in answer_of(made).commands] == lines


def test_the_answer_names_values_intervals_and_the_time_that_more_steps_take() -> None:
    answer = answer_of(run(LONGER))
    assert answer.values == {"b": 0.75, "a": 0.25}
    assert list(answer.values) == ["b", "a"]
    assert answer.commands[0].purpose == "run longer, to 72 steps (about 3 minutes more)"


def test_a_job_of_several_processes_goes_on_with_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    line = answer_of(run(LONGER)).commands[0].line
    assert line.startswith("torchrun --nnodes 2 --nproc-per-node 4 -m bilevel run --resume 'my run'")


def test_commands_are_those_of_where_the_run_is_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("mix", RUN, f"{RUN}/mix.jsonl", f"{HERE}data/a b.jsonl")
    assert shlex.split(command_line(words, Path("runs/a"), tmp_path)) == [
        "mix", "runs/a", "runs/a/mix.jsonl", "data/a b.jsonl"
    ]  # fmt: skip
    elsewhere = command_line(words, Path("runs/a"), tmp_path / "other")
    assert shlex.split(elsewhere)[-1] == str(tmp_path / "other" / "data" / "a b.jsonl")


def test_the_answer_of_a_directory_is_that_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = run(USE)
    directory = tmp_path / "my run"
    directory.mkdir()
    (directory / "metrics.jsonl").write_text("".join(record.to_json() + "\n" for record in made.history))
    (directory / "account.json").write_text(account_of(made).to_json())
    assert read_run(Path("my run")).answer == answer_of(made)


def test_commands_are_not_wrapped_and_the_rest_fits_a_narrow_terminal() -> None:
    screen = io.StringIO()
    made = run(replace(LONGER, reason="a long reason " * 20), output="a/" * 60)
    Console(file=screen, width=80).print(answer_of(made), crop=False)
    lines = screen.getvalue().splitlines()
    assert [line for line in lines if len(line) > 80] == [line for line in lines if line.startswith("    bilevel ")]
    assert f"    bilevel report {'a/' * 60}"[:-1] in lines


def test_the_account_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    content = json.loads(Account(1, 0, {}).to_json())
    del content["next_steps"]
    (tmp_path / "account.json").write_text(json.dumps(content))
    assert Account.read(tmp_path / "account.json").next_steps == ()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "1 second"),
        (40, "40 seconds"),
        (110, "110 seconds"),
        (180, "3 minutes"),
        (9000, "2.5 hours"),
        (3e5, "3.5 days"),
    ],
)
def test_a_duration_is_rounded_to_what_an_estimate_is_good_for(seconds: float, words: str) -> None:
    assert in_words(seconds) == words
