"""The commands, in process: what they write and what they refuse."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from bilevel import InputError
from bilevel.cli import app
from bilevel_llm.finetuning.problem import FineTuning
from tests.bilevel_llm.tiny import sentences, write_rows


def bilevel(*words: Any) -> str:
    """Run a command; raises what it raises."""
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def basics(model_directory: Callable[[str], Path], data: dict[str, str]) -> list[str]:
    return [
        "--model", str(model_directory("llama")), "--data", data["clean"], "--max-length", "64", "--batch-size", "8",
        "--set", "backend.device=cpu",
    ]  # fmt: skip


def recipe_of(run: Path) -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load((run / "recipe.yaml").read_text())
    return tree


def test_finetune_writes_a_model_that_is_better_at_the_validation_rows(
    basics: list[str], data: dict[str, str], tmp_path: Path, model_directory: Callable[[str], Path]
) -> None:
    run = tmp_path / "run"
    shown = bilevel(
        "finetune", *basics, "--validation", data["target"], "--output", run, "--epochs", 2, "--lr", "1e-2", "--seed", 3
    )
    recipe = recipe_of(run)
    assert {key: recipe["run"][key] for key in ("steps", "output", "seed")} == {"steps": 10, "output": str(run), "seed": 3}
    assert recipe["solver"]["lr"] == {"peak": 0.01, "steps": 10, "warmup": 0, "floor": 0.0, "name": "cosine"}
    assert recipe["active"] == {"name": "all"}
    assert recipe["solver"]["evaluate_every"] == 1
    (tuned,) = json.loads((run / "evaluation.json").read_text()).values()
    assert f"{tuned['loss']:.4f}" in shown
    bilevel(
        "evaluate", model_directory("llama"), "--data", data["target"], "--max-length", 64, "--json", tmp_path / "before"
    )
    (before,) = json.loads((tmp_path / "before").read_text()).values()
    assert tuned["loss"] < before["loss"] - 0.1
    assert tuned["rows"] == before["rows"] == 30
    AutoModelForCausalLM.from_pretrained(run / "model")
    AutoTokenizer.from_pretrained(run / "model")
    assert (run / "losses.png").exists()
    assert not (run / "weights.png").exists()


@pytest.mark.parametrize(
    ("method", "peak", "blocks", "lora"),
    [
        ("full", 1e-5, "all", None),
        ("lisa", 1e-5, "lisa", None),
        ("lora", 1e-4, "all", {"rank": 16, "alpha": 32.0, "targets": "all-linear", "quantize": None}),
    ],
)
def test_methods_set_what_trains_and_how_fast(
    basics: list[str], tmp_path: Path, method: str, peak: float, blocks: str, lora: Any
) -> None:
    bilevel("finetune", *basics, "--output", tmp_path / "run", "--steps", 2, "--method", method)
    recipe = recipe_of(tmp_path / "run")
    assert recipe["solver"]["lr"]["peak"] == peak
    assert recipe["active"]["name"] == blocks
    assert recipe["problem"]["lora"] == lora
    active = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["active"]
    layers = [block for block in active if "layers" in block]
    assert len(layers) == (2 if method == "lisa" else 3)
    assert ({"embedding", "head", "rest"} <= set(active)) == (method != "lora")


def test_a_stopped_run_goes_on_without_its_options_being_repeated(basics: list[str], tmp_path: Path) -> None:
    """Stopped by taking away its last checkpoint and its model; the model comes out bit for bit the same."""
    for name in ("whole", "cut"):
        bilevel(
            "finetune", *basics, "--output", tmp_path / name, "--steps", 4, "--lr", "1e-2", "--set", "run.checkpoint_every=2"
        )
    import shutil

    shutil.rmtree(tmp_path / "cut" / "model")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000004")
    bilevel("finetune", "--resume", "--output", tmp_path / "cut")
    whole, cut = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert whole == cut
    (tmp_path / "cut" / "model").rename(tmp_path / "moved")
    with pytest.raises(InputError, match=r"a different recipe: problem\.batch_size was 8 and is now 4"):
        bilevel("finetune", "--resume", "--output", tmp_path / "cut", "--batch-size", 4)
    with pytest.raises(InputError, match=r"solver\.lr is 0 at the end of 9 steps"):
        bilevel("finetune", "--resume", "--output", tmp_path / "cut", "--steps", 9)


def test_a_run_that_was_killed_before_its_evaluation_is_evaluated_and_not_trained_again(
    basics: list[str], data: dict[str, str], tmp_path: Path
) -> None:
    bilevel("finetune", *basics, "--output", tmp_path / "run", "--steps", 1, "--validation", data["target"])
    files = [tmp_path / "run" / name for name in ("evaluation.json", "model/model.safetensors", "metrics.jsonl")]
    before = [file.read_bytes() for file in files]
    files[0].unlink()
    for _ in range(2):  # the second time there is nothing left to do
        bilevel("finetune", "--resume", "--output", tmp_path / "run")
        assert [file.read_bytes() for file in files] == before


def test_a_run_that_has_its_model_is_not_trained_on(basics: list[str], tmp_path: Path) -> None:
    bilevel("finetune", *basics, "--output", tmp_path / "run", "--steps", 1, "--set", "solver.lr=1e-3")
    with pytest.raises(InputError, match=r"run/model already exists"):
        bilevel("finetune", "--resume", "--output", tmp_path / "run", "--steps", 2)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1
    (tmp_path / "run" / "model").rename(tmp_path / "first")
    bilevel("finetune", "--resume", "--output", tmp_path / "run", "--steps", 2)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_recipe_does_the_same_under_run_and_finetune(basics: list[str], tmp_path: Path) -> None:
    """And options stand above it."""
    bilevel("finetune", *basics, "--output", tmp_path / "first", "--steps", 2, "--lr", "1e-2")
    recipe = tmp_path / "first" / "recipe.yaml"
    bilevel("run", recipe, "--output", tmp_path / "second")
    bilevel("export-model", tmp_path / "second", tmp_path / "second-model", "--dtype", "bfloat16")
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "first" / "model")
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "second-model")
    assert second.dtype == torch.bfloat16
    for name, tensor in second.state_dict().items():
        assert torch.equal(tensor, first.state_dict()[name].bfloat16())
    bilevel("finetune", recipe, "--output", tmp_path / "third", "--steps", 1, "--method", "lora")
    assert recipe_of(tmp_path / "third")["problem"]["lora"]["rank"] == 16
    assert recipe_of(tmp_path / "third")["problem"]["batch_size"] == 8


def test_what_a_recipe_says_and_no_option_does_stays(basics: list[str], tmp_path: Path) -> None:
    recipe = {
        "problem": {"name": "llm-finetuning", "model": basics[1], "data": basics[3], "lora": {"rank": 3}, "batch_size": 8},
        "solver": {"name": "descent", "evaluate_every": 7},
        "backend": {"name": "torch", "device": "cpu"},
        "run": {"output": str(tmp_path / "run"), "seed": 5},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    bilevel("finetune", tmp_path / "recipe.yaml", "--epochs", 0.4)
    done = recipe_of(tmp_path / "run")
    assert done["problem"]["lora"]["rank"] == 3
    assert done["solver"]["lr"]["peak"] == 1e-4  # that of adapters
    assert done["solver"]["evaluate_every"] == 7
    assert (done["run"]["steps"], done["run"]["seed"]) == (2, 5)


def test_the_length_can_be_given_in_tokens(basics: list[str], tmp_path: Path) -> None:
    bilevel("finetune", *basics, "--output", tmp_path / "run", "--tokens", 900)
    sizes = [json.loads(line)["size"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(sizes[:-1]) < 900 <= sum(sizes)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "lorra"], "--method lorra: there is no such method; did you mean 'lora'?"),
        (["--steps", "3", "--epochs", "1"], "--epochs and --steps are given; give one of them"),
        (["--lr", "-1"], "--lr is -1.0; it must be positive"),
        (["--set", "solver.lr=-1"], "solver.lr is -1: Input should be greater than or equal to 0"),
        (["--set", "run.steps=ten"], "run.steps is 'ten'"),
        (["--set", "run.steps=-3"], "run.steps is -3: Input should be greater than or equal to 1"),
        (["--epochs", "0"], "--epochs is 0.0; it must be positive"),
        (["--set", "problem.batchsize=3"], "--set problem.batchsize=3: unknown key problem.batchsize; did you mean 'batch_size'?"),
        (["--set", "solver.lr=fast"], "solver.lr is 'fast'"),
        (["--data", "no-such.jsonl"], "no such file: no-such.jsonl"),
        (["--validation", "no-such.jsonl"], "no such file: no-such.jsonl"),
        (["--max-length", "4"], "no row has a token to learn within max_length=4"),
        (["--model", "no/such"], "problem.model: 'no/such' is neither"),
        (["--resume"], "there is no run to resume in out"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_the_model_is_loaded(
    basics: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(FineTuning, "lower", lambda self: pytest.fail("the model was loaded"))
    with pytest.raises(InputError) as caught:
        bilevel("finetune", *basics, "--output", "out", *words)
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--model", "--data", "--output"])
def test_what_is_missing_is_named(option: str) -> None:
    given = {"--model": "m", "--data": "d", "--output": "o"}
    del given[option]
    with pytest.raises(InputError, match=f"{option} is missing"):
        bilevel("finetune", *(word for pair in given.items() for word in pair))


def test_an_output_that_exists_is_left_alone(basics: list[str], tmp_path: Path) -> None:
    (tmp_path / "note").write_text("mine")
    with pytest.raises(InputError, match="is not empty"):
        bilevel("finetune", *basics, "--output", tmp_path, "--steps", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["note"]


def test_recipes_of_other_problems_are_left_to_run(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("problem: {name: quadratic}\n")
    with pytest.raises(InputError, match="is a recipe of the problem 'quadratic'; `bilevel run` does what it says"):
        bilevel("finetune", tmp_path / "recipe.yaml")


def test_a_mix_with_provenance_is_read_like_any_other_file(basics: list[str], tmp_path: Path) -> None:
    rows = [
        {"_bilevel": {"source": "a", "file": "f", "row": i, "repeat": 0}, **row} for i, row in enumerate(sentences(1, 9))
    ]
    mix = write_rows(tmp_path / "mix.jsonl", rows)
    bilevel("finetune", *basics, "--data", mix, "--output", tmp_path / "run", "--steps", 1)
    assert json.loads((tmp_path / "run" / "training.json").read_text())["data"]["training"]["rows"] == 49
