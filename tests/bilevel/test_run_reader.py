import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bilevel import Finding, Labels, Record, ScaleBiO, fit
from bilevel.errors import InputError
from bilevel.record import average
from bilevel.run_reader import read_run
from bilevel_backends.torch_backend import TorchBackend
from tests.bilevel.conftest import Make
from tests.conftest import Distance


def test_the_state_of_a_run_is_told(make_run: Make) -> None:
    assert read_run(make_run("whole")).state == "complete, 40 steps"
    part = make_run("part", steps=20)
    assert "20 of 40 steps: it seems to be running" in read_run(part).state
    long_ago = time.time() - 3600
    os.utime(part / "metrics.jsonl", (long_ago, long_ago))
    assert "interrupted or failed" in read_run(part).state
    assert "no step of 40 done" in read_run(make_run("none", steps=0)).state


def test_a_line_that_is_being_written_is_left_out(make_run: Make) -> None:
    file = make_run() / "metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 40, "upp')
    assert len(read_run(file.parent).history) == 40


def test_damage_is_named_with_file_and_line(make_run: Make) -> None:
    file = make_run() / "metrics.jsonl"
    whole = file.read_text()
    lines = whole.splitlines()
    file.write_text("\n".join([*lines[:4], "{broken", *lines[5:]]) + "\n")
    with pytest.raises(InputError, match=r"metrics.jsonl:5: not JSON"):
        read_run(file.parent)
    file.write_text(json.dumps({"loss": 1.0}) + "\n")
    with pytest.raises(InputError, match=r"metrics.jsonl:1: not the record of a step"):
        read_run(file.parent)
    file.write_text(whole)
    (file.parent / "account.json").write_text("{")
    with pytest.raises(InputError, match=r"account.json: not JSON"):
        read_run(file.parent)
    (file.parent / "account.json").unlink()
    (file.parent / "recipe.yaml").write_text("a: [")
    with pytest.raises(InputError, match=r"recipe.yaml:1: not valid YAML"):
        read_run(file.parent)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": 2}, "schema is 2, and this version of bilevel reads schema 1"),
        ({"findings": [{"name": "odd", "flagged": True}]}, "findings.0.sentence"),
        ({"verdict": "good"}, "verdict"),
    ],
)
def test_an_account_of_another_form_is_refused_naming_file_and_key(make_run: Make, change: Any, words: str) -> None:
    file = make_run() / "account.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(InputError) as caught:
        read_run(file.parent)
    assert str(caught.value).startswith(f"{file}: ")
    assert words in str(caught.value)


def test_an_account_that_is_older_than_the_metrics_is_noted(make_run: Make) -> None:
    file = make_run() / "account.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "steps": 30}))
    assert "account.json is from step 30, metrics.jsonl goes to step 40" in read_run(file.parent).notes


def test_a_run_without_a_recipe_is_read_and_said_to_lack_it(make_run: Make) -> None:
    path: Path = make_run()
    (path / "recipe.yaml").unlink()
    run = read_run(path)
    assert run.seed == 0  # account.json has it
    assert any("recipe.yaml is missing" in note for note in run.notes)


def test_what_a_run_wrote_is_what_is_read(tmp_path: Path) -> None:
    class Told(Distance):
        labels = Labels(unit="stones")

        def findings(self, history: Sequence[Record]) -> list[Finding]:
            return [Finding("far", len(history) < 9, f"{len(history)} steps")]

    solver = ScaleBiO(penalty=5.0, lr_x=0.04, lr_z=0.3, warmup=2)
    result = fit(Told(), solver, TorchBackend(device="cpu"), steps=6, seed=3, output=tmp_path / "run")
    run = read_run(tmp_path / "run")
    assert run.history == result.history
    assert run.average == average(result.history)
    assert (run.seed, run.warmup_steps, len(run.averaged)) == (3, 2, 2)
    assert run.labels == Labels(unit="stones")
    assert run.account is not None
    assert run.account.findings == [Finding("far", True, "6 steps")]
