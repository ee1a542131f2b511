from bilevel.report.groups import differences, group_runs
from bilevel.run_reader import read_run
from tests.bilevel.conftest import Make


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
