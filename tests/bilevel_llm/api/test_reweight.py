"""`bilevel.reweight`, from what is in memory to weights, mixes and reports."""

from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import bilevel
from bilevel import InputError, Interrupted
from bilevel.run_directory import RunDirectory
from bilevel_llm.api.inputs import Inputs
from bilevel_llm.first_recipe.step_size import TRIED
from tests.bilevel_llm.tiny import WORDS, sentences

QUICK = {"solver.horizon": 2, "active": {"name": "all"}, "backend.device": "cpu"}
ROWS = sentences(0, 20)


def kinds_of_rows(tmp_path: Path) -> dict[str, Any]:
    return {
        "dictionaries": ROWS,
        "Dataset": datasets.Dataset.from_list(ROWS),
        "shuffled view": datasets.Dataset.from_list(ROWS[::-1]).select(range(19, -1, -1)),
        "stream": datasets.Dataset.from_list(ROWS + ROWS).to_iterable_dataset(),
        "pandas": pandas.DataFrame(ROWS),
        "pyarrow": pyarrow.Table.from_pylist(ROWS),
        "file": write(tmp_path / "rows.jsonl"),
        "files": [write(tmp_path / "rows.jsonl")],
        "settings": {"path": str(write(tmp_path / "rows.jsonl")), "format": "alpaca"},
        "rows with settings": {"rows": ROWS, "format": "alpaca"},
    }


def write(file: Path) -> Path:
    datasets.Dataset.from_list(ROWS).to_json(str(file))
    return file


@pytest.fixture(scope="module")
def done(model_directory: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run from what is in memory, of four rounds."""
    from transformers import AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_directory())
    return bilevel.reweight(
        model,
        {"same": ROWS, "other/words": pandas.DataFrame(sentences(1, 20, [word[::-1] for word in WORDS]))},
        datasets.Dataset.from_list(sentences(2, 20)),
        tokenizer=AutoTokenizer.from_pretrained(model_directory()),
        output=tmp_path_factory.mktemp("run") / "of mine",
        steps=8,
        lr=1e-2,
        batch_size=4,
        max_length=64,
        settings=QUICK,
        progress=False,
    )


def reweight(model: Any, **changes: Any) -> Any:
    """A run whose arguments are right but for the changes."""
    arguments: dict[str, Any] = {"sources": {"a": ROWS, "b": ROWS}, "target": ROWS, "settings": QUICK, "max_length": 64}
    return bilevel.reweight(model, **{**arguments, "steps": 2, "batch_size": 4, "lr": 1e-3, "progress": False, **changes})


def test_all_kinds_of_rows_become_the_same_rows(tmp_path: Path) -> None:
    from bilevel_llm.data.files import find_files, read_objects

    inputs = Inputs(tmp_path / "inputs", max_rows=20)
    given = {name: inputs.settings(rows, name, name) for name, rows in kinds_of_rows(tmp_path).items()}
    inputs.write()
    for name, settings in given.items():
        paths = settings["path"] if isinstance(settings["path"], list) else [settings["path"]]
        rows = [row for file in find_files(paths) for _, row in read_objects(file)]
        assert rows == ROWS, name
    assert given["rows with settings"]["format"] == given["settings"]["format"] == "alpaca"


def test_a_run_from_memory_has_weights_and_a_verdict_and_can_be_shown(done: Any) -> None:
    assert set(done.weights) == {"same", "other/words"}
    assert sum(done.weights.values()) == pytest.approx(1)
    assert done.verdict.decision == "run longer"
    assert "other/words" in repr(done)
    assert done.verdict.reason in repr(done)
    assert "<td style='text-align:left'>other/words</td>" in done._repr_html_()
    assert done.plot().png().startswith(b"\x89PNG")
    assert "of mine" in done.report().read_text()
    assert done.mix(6)["output"][0]
    assert done.to_csv() == done.export("csv")
    assert {"to_trl", "to_csv"} <= set(dir(done))
    with pytest.raises(AttributeError, match="to_nothing"):
        done.to_nothing()


def test_a_run_goes_on_as_if_it_had_never_stopped(done: Any, model_directory: Any, tmp_path: Path) -> None:
    problem = done.recipe.tree["problem"]
    arguments: dict[str, Any] = {
        "sources": {source["name"]: source["path"] for source in problem["sources"]},
        "target": problem["validation"][0]["path"],
        "lr": 1e-2,
    }
    once = reweight(problem["model"], **arguments, output=tmp_path / "once", steps=8)
    twice = reweight(problem["model"], **arguments, output=tmp_path / "twice", steps=4).extend(8, progress=False)
    assert twice.weights == once.weights == done.weights
    assert len(twice.history) == 8


def test_a_run_is_used_from_another_folder_than_it_was_made_in(
    done: Any, model_directory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    reweight(model_directory(), output="run", target=sentences(9, 20))  # what is in memory lies at a relative path
    monkeypatch.chdir(tmp_path / "here")
    run = bilevel.load_reweighting("../there/run")
    assert len(run.mix(4, output="mix.jsonl")) == 4
    assert (tmp_path / "here" / "mix.jsonl").exists()
    assert set(run.to_csv("weights.csv")) == {"weights.csv"}
    assert (tmp_path / "here" / "weights.csv").exists()
    assert len(run.extend(4, progress=False).history) == 4


def test_the_recipe_is_one_that_the_command_line_runs(done: Any, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from bilevel.cli import app

    done.recipe.save(tmp_path / "recipe.yaml")
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["solver"]["horizon"] == 2
    result = CliRunner().invoke(app, ["run", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "again")])
    assert result.exit_code == 0, result.output
    assert bilevel.load_reweighting(tmp_path / "again").weights == done.weights


def test_a_mix_can_be_written_and_is_returned(done: Any, tmp_path: Path) -> None:
    mixed = done.mix(6, output=tmp_path / "mix.parquet", format="messages", seed=1)
    assert len(mixed) == 6
    assert mixed["messages"][0][0]["role"] == "user"
    assert (tmp_path / "mix.parquet.json").exists()


def test_a_mix_draws_from_the_sample_of_the_run_or_from_all_rows(model_directory: Any, tmp_path: Path) -> None:
    sampled = {"path": str(write(tmp_path / "rows.jsonl")), "max_rows": 10}
    result = reweight(
        model_directory(), sources={"a": sampled, "b": sampled}, target=sentences(2, 20), output=tmp_path / "run"
    )
    even = tmp_path / "even.json"
    even.write_text('{"a": 0.5, "b": 0.5}')
    with pytest.raises(InputError, match="--all-rows"):
        result.mix(24, weights=str(even), max_repeats=1)
    assert len(result.mix(24, weights=str(even), max_repeats=1, all_rows=True)) == 24


def test_without_an_output_every_run_has_a_directory_of_its_own(
    model_directory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bilevel_llm.api.reweight.carry_out", lambda *_, **__: None)
    monkeypatch.setattr(
        "bilevel_llm.api.reweight.Reweighting", lambda directory: directory.mkdir(exist_ok=True) or directory
    )
    assert [str(reweight(model_directory())) for _ in range(2)] == ["runs/reweighting", "runs/reweighting-2"]


def test_an_interrupted_run_says_how_to_go_on_from_python(
    model_directory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise Interrupted("stopped after 1 of 2 steps; a checkpoint is in there; continue with --resume")

    monkeypatch.setattr("bilevel.config.Config.fit", stopped)
    with pytest.raises(
        Interrupted, match=r"a checkpoint is in there; continue with bilevel.load_reweighting\('.*'\).extend"
    ):
        reweight(model_directory(), output=tmp_path / "run")


def test_a_run_that_failed_before_its_first_step_can_be_started_again(model_directory: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="batch of 64 needs 32"):
        reweight(model_directory(), output=tmp_path / "run", batch_size=64)
    assert reweight(model_directory(), output=tmp_path / "run").weights
    with pytest.raises(InputError, match="holds another run"):
        reweight(model_directory(), output=tmp_path / "run")


def test_a_step_size_that_is_not_given_is_found_on_the_data(model_directory: Any, tmp_path: Path) -> None:
    found = reweight(model_directory(), output=tmp_path / "run", lr="auto").recipe.tree["solver"]["lr_z"]
    assert found in TRIED
    assert found > 1e-4  # of a model with random weights
    given = reweight(model_directory(), output=tmp_path / "other", lr="auto", settings={**QUICK, "solver.lr_z": 0.5})
    assert given.recipe.tree["solver"]["lr_z"] == 0.5


STREAM = datasets.Dataset.from_list(ROWS).to_iterable_dataset()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sources": [ROWS, ROWS]}, "sources must be a mapping"),
        ({"sources": {1: ROWS, "b": ROWS}}, "sources must be a mapping"),
        ({"sources": {"a": ROWS}}, "sources has 1 of at least two"),
        ({"sources": {"a": 3, "b": ROWS}}, r"sources\['a'\] is an int; give a path"),
        ({"sources": {"a": [], "b": ROWS}}, r"sources\['a'\] has no rows"),
        ({"sources": {"a": [*ROWS, "x"], "b": ROWS}}, r"sources\['a'\]\[20\] is a str; every row is a dictionary"),
        ({"sources": {"a": [{"text": {1}}], "b": ROWS}}, r"sources\['a'\]\[0\] cannot be written as JSON: .*set"),
        (
            {"sources": {"a": [{"text": "\ud800"}], "b": ROWS}},
            r"sources\['a'\]\[0\] cannot be written as JSON: .*surrogates",
        ),
        ({"sources": {"a": [{"x": float("nan")}], "b": ROWS}}, r"sources\['a'\]\[0\] cannot be written as JSON"),
        ({"sources": {"a": STREAM, "b": ROWS}}, r"sources\['a'\] is a stream, .*give max_rows"),
        ({"sources": {"a": datasets.DatasetDict(train=STREAM), "b": ROWS}}, r"holds the splits train; give one"),
        ({"sources": {"a": pandas.DataFrame({"x": [1, "a"]}), "b": ROWS}}, r"sources\['a'\]: this pandas.DataFrame cannot"),
        ({"sources": {"a": {"format": "text"}, "b": ROWS}}, r"sources\['a'\]: give either 'path' or 'rows'"),
        ({"sources": {"a": {"rows": ROWS, "format": "texxt"}, "b": ROWS}}, "did you mean 'text'"),
        ({"target": None}, "target is missing"),
        ({"target": {}}, "target is empty"),
        ({"target": {"t": 1.5}}, r"target\['t'\] is a float"),
        ({"tokenizer": "gpt2"}, "tokenizer belongs to a model that is loaded"),
        ({"model": 3}, "model is an int"),
        ({"model": torch.nn.Linear(1, 1)}, "model is a torch.Linear"),
        ({"steps": 0}, "run.steps is 0"),
        ({"lr": -1.0}, "solver.lr_z is -1.0"),
        (
            {"lr": "auto", "settings": {"solver": {"name": "odm"}}},
            "lr is not searched for with the solver ODM",
        ),
        ({"max_length": 1.5}, "problem.max_length is 1.5"),
        ({"backend": "torhc"}, "did you mean 'torch'"),
        ({"settings": 3}, "settings is 3; give a mapping"),
        ({"settings": {"solver.horizn": 3}}, r"settings\['solver.horizn'\]: unknown key .*did you mean 'horizon'"),
        ({"output": 3}, "output is 3; give the path of a directory"),
    ],
)
def test_what_cannot_be_is_refused_by_the_name_of_the_argument_before_anything_is_trained(
    changes: dict[str, Any], said: str, model_directory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bilevel.config.Config.fit", lambda *_, **__: pytest.fail("the run began"))
    model = changes.pop("model", model_directory())
    with pytest.raises(InputError, match=said):
        reweight(model, **{"output": tmp_path / "run", **changes})


@pytest.mark.parametrize(
    ("spoil", "tokenizer", "said"),
    [
        (lambda model: None, None, "tokenizer is missing; a loaded model needs"),
        (lambda model: None, "gpt2", "tokenizer is a str"),
        (lambda model: setattr(model, "is_quantized", True), ..., "model is quantized"),
        (lambda model: model.to("meta"), ..., "model has weights that are not loaded"),
    ],
)
def test_a_loaded_model_that_cannot_be_trained_from_files_is_refused(
    spoil: Any, tokenizer: Any, said: str, model_directory: Any, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_directory())
    spoil(model)
    own = AutoTokenizer.from_pretrained(model_directory())
    with pytest.raises(InputError, match=said):
        reweight(model, tokenizer=own if tokenizer is ... else tokenizer, output=tmp_path / "run")


def test_what_is_no_reweighting_run_is_not_loaded(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not the directory of a run of llm-reweighting"):
        bilevel.load_reweighting(tmp_path)
    RunDirectory(tmp_path / "other").begin({"problem": {"name": "quadratic"}})
    with pytest.raises(InputError, match="is not the directory of a run of llm-reweighting"):
        bilevel.load_reweighting(tmp_path / "other")
    RunDirectory(tmp_path / "new").begin({"problem": {"name": "llm-reweighting", "sources": []}})
    with pytest.raises(InputError, match="has not done a step"):
        bilevel.load_reweighting(tmp_path / "new")
