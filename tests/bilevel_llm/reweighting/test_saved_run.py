import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from bilevel.errors import InputError
from bilevel.plugins import Plugins
from bilevel_llm.reweighting.saved_run import read_run
from tests.bilevel_llm.tiny import AVERAGE, FINAL, alpaca, write_jsonl

MakeRun = Callable[..., Path]


def write(path: Path, content: Any) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def test_the_average_is_taken_unless_the_final_weights_are_asked_for(make_run: MakeRun, plugins: Plugins) -> None:
    directory = make_run()
    assert read_run(directory, plugins).weights == pytest.approx(AVERAGE, abs=1e-15)
    assert read_run(directory, plugins, "final").weights == pytest.approx(FINAL, abs=1e-15)
    assert read_run(directory, plugins, "final").origin == f"{directory}/weights.json (final)"


def test_the_problem_is_that_of_the_recipe(make_run: MakeRun, plugins: Plugins) -> None:
    run = read_run(make_run(max_length=33), plugins)
    assert run.problem.max_length == 33
    assert [source.name for source in run.problem.sources] == ["web", "books", "chat"]


def test_a_problem_that_a_python_recipe_gave_as_an_object_is_found_by_its_class(make_run: MakeRun, plugins: Plugins) -> None:
    directory = make_run()
    recipe = yaml.safe_load((directory / "recipe.yaml").read_text())
    del recipe["problem"]["name"]
    recipe["problem"] = {"class": "bilevel_llm.reweighting.problem:LLMReweighting", **recipe["problem"]}
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert read_run(directory, plugins).problem.batch_size == 16


def test_weights_can_come_from_a_file_and_are_scaled(make_run: MakeRun, plugins: Plugins, tmp_path: Path) -> None:
    run = read_run(make_run(), plugins, write(tmp_path / "w.json", {"chat": 1, "web": 3, "books": 0}))
    assert run.weights == {"web": 0.75, "books": 0.0, "chat": 0.25}
    assert list(run.weights) == ["web", "books", "chat"]  # in the order of the recipe
    other = write(tmp_path / "o.json", {"sources": FINAL, "average": {"web": 0.2, "books": 0.2, "chat": 0.6}, "steps": 9})
    assert read_run(tmp_path / "run", plugins, other).weights == pytest.approx({"web": 0.2, "books": 0.2, "chat": 0.6})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"web": 1, "books": 1}, "the source 'chat' has no weight"),
        ({"web": 1, "books": 1, "chat": 1, "chta": 1}, "'chta' is not a source of the recipe; did you mean 'chat'?"),
        ({"web": 1, "books": -0.1, "chat": 1}, "the weight of 'books' is -0.1; it must be a number, and not negative"),
        ({"web": 1, "books": "2", "chat": 1}, "the weight of 'books' is '2'"),
        ({"web": 1, "books": True, "chat": 1}, "the weight of 'books' is True"),
        ({"web": float("nan"), "books": 1, "chat": 1}, "the weight of 'web' is nan"),
        ({"web": 0, "books": 0, "chat": 0}, "all weights are 0"),
        ({"web": 1e308, "books": 1e308, "chat": 1}, "the weight of 'web' is 1e+308"),
        ({"web": 10**400, "books": 1, "chat": 1}, "the weight of 'web' is 1000"),
        ({"web": "1", "books": 1, "chat": 1}, "the weight of 'web' is '1'"),
        ([1, 2, 3], "should be a valid dictionary"),
        ({"sources": {"web": 1}, "average": {"web": 1}}, "the source 'books' has no weight"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    make_run: MakeRun, plugins: Plugins, tmp_path: Path, content: Any, says: str
) -> None:
    with pytest.raises(InputError) as caught:
        read_run(make_run(), plugins, write(tmp_path / "w.json", content))
    assert says in str(caught.value)
    assert "w.json" in str(caught.value)


def test_files_of_weights_that_cannot_be_read_are_named(make_run: MakeRun, plugins: Plugins, tmp_path: Path) -> None:
    (tmp_path / "w.json").write_text("{web: 1}")
    directory = make_run()
    with pytest.raises(InputError, match=r"w\.json: not JSON"):
        read_run(directory, plugins, str(tmp_path / "w.json"))
    with pytest.raises(
        InputError, match="--weights avrage: there is no such file; give average, final, or the path of a JSON file"
    ):
        read_run(directory, plugins, "avrage")


def test_a_directory_that_is_no_run_or_has_no_weights_is_named(make_run: MakeRun, plugins: Plugins, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is not a run: there is no recipe\.yaml"):
        read_run(tmp_path, plugins)
    directory = make_run()
    (directory / "weights.json").unlink()
    with pytest.raises(InputError, match=r"has no weights yet: there is no weights\.json"):
        read_run(directory, plugins)
    assert read_run(directory, plugins, write(tmp_path / "w.json", AVERAGE)).hashes == {}  # given weights will do


def test_a_run_of_another_problem_has_no_sources(tmp_path: Path, plugins: Plugins) -> None:
    (tmp_path / "recipe.yaml").write_text("problem: {name: quadratic}")
    with pytest.raises(InputError, match="a run of the problem 'quadratic', which has no sources to mix"):
        read_run(tmp_path, plugins)
    (tmp_path / "recipe.yaml").write_text("problem: {name: llm-reweighting, modell: x}")
    with pytest.raises(InputError, match=r"recipe\.yaml:1: unknown key problem\.modell; did you mean 'model'\?"):
        read_run(tmp_path, plugins)
    (tmp_path / "recipe.yaml").write_text("- 1")
    with pytest.raises(InputError, match=r"recipe\.yaml: a recipe is a mapping"):
        read_run(tmp_path, plugins)


def test_data_that_changed_since_the_run_is_named(make_run: MakeRun, plugins: Plugins, tmp_path: Path) -> None:
    run = read_run(make_run(), plugins)
    run.check_data()
    write_jsonl(tmp_path / "books.jsonl", alpaca("books", 21))
    with pytest.raises(InputError, match=r"the data of 'books' changed since.*--allow-changed-data"):
        run.check_data()


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("data", 3, "data: Input should be"),
        ("data", {"sources": {"web": {}}}, r"data\.sources\.web\.hash: "),
        ("findings", [{"name": 1}], r"findings\.0\.name: "),
    ],
)
def test_a_weights_file_of_other_types_is_named_with_its_key(
    make_run: MakeRun, plugins: Plugins, key: str, value: Any, says: str
) -> None:
    run = make_run()
    file = run / "weights.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(InputError, match=rf"weights\.json: {says}"):
        read_run(run, plugins)


def test_trust_is_given_by_whoever_runs_and_not_by_the_recipe_of_a_run(make_run: MakeRun, plugins: Plugins) -> None:
    from bilevel.trust import trusting_remote_code

    run = make_run()
    recipe = run / "recipe.yaml"
    tree = yaml.safe_load(recipe.read_text())
    tree["problem"]["trust_remote_code"] = True
    recipe.write_text(yaml.safe_dump(tree))
    with pytest.raises(InputError, match=r"trust_remote_code asks to run code .*--trust-remote-code"):
        read_run(run, plugins)
    with trusting_remote_code():
        assert read_run(run, plugins).problem.trust_remote_code
