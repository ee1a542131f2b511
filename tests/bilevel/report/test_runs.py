import json
import os
import time
from pathlib import Path

import pytest

from bilevel.errors import InputError
from bilevel.report.runs import differences, group_runs, read_run
from tests.bilevel.report.conftest import Make


def test_runs_that_differ_in_the_seed_are_one_group_and_other_recipes_others(make_run: Make) -> None:
    paths = [make_run("a", seed=0), make_run("b", seed=1), make_run("c", seed=0, penalty=20.0)]
    groups = group_runs([read_run(path) for path in paths])
    assert [[run.label for run in group.runs] for group in groups] == [["a", "b"], ["c"]]
    assert [group.name for group in groups] == ["penalty 10.0", "penalty 20.0"]
    assert differences(groups) == {"solver.penalty": [10.0, 20.0]}


def test_the_same_recipe_on_other_data_is_another_group(make_run: Make) -> None:
    groups = group_runs([read_run(make_run("a")), read_run(make_run("b", seed=1, data_hash="ff" * 32))])
    assert len(groups) == 2
    assert any(key.startswith("data.sources.web") for key in differences(groups))


def test_seeds_that_stopped_early_or_repeat_are_left_out_of_means_and_named(make_run: Make) -> None:
    paths = [make_run("a", seed=0), make_run("early", seed=1, steps=20), make_run("again", seed=0), make_run("b", seed=2)]
    (group,) = group_runs([read_run(path) for path in paths])
    assert [run.label for run in group.counted] == ["a", "b"]
    assert any("early has 20 of 40 steps" in note for note in group.notes)
    assert any("again repeats seed 0 of a" in note for note in group.notes)


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
    (file.parent / "weights.json").write_text("{")
    with pytest.raises(InputError, match=r"weights.json: not JSON"):
        read_run(file.parent)
    (file.parent / "weights.json").unlink()
    (file.parent / "recipe.yaml").write_text("a: [")
    with pytest.raises(InputError, match=r"recipe.yaml: not valid YAML"):
        read_run(file.parent)


def test_weights_that_are_older_than_the_metrics_are_noted(make_run: Make) -> None:
    path = make_run()
    learned = json.loads((path / "weights.json").read_text())
    (path / "weights.json").write_text(json.dumps({**learned, "steps": 30}))
    assert "weights.json is from step 30, metrics.jsonl goes to step 40" in read_run(path).notes


def test_a_run_without_a_recipe_is_read_and_said_to_lack_it(make_run: Make) -> None:
    path: Path = make_run()
    (path / "recipe.yaml").unlink()
    run = read_run(path)
    assert run.seed == 0  # weights.json has it
    assert any("recipe.yaml is missing" in note for note in run.notes)
