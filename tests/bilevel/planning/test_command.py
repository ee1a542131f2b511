"""`bilevel plan` as a user runs it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bilevel.cli import app, main
from bilevel.plugins import Part, Plugins
from tests.bilevel.planning.conftest import PLANS, ROOT
from tests.bilevel_llm.tiny import FAMILIES

RECIPE = """
problem:
  name: llm-reweighting
  model: {model}
  sources: [{{name: a, path: not/there/a.jsonl}}, {{name: b, path: not/there/b.jsonl}}]
  validation: [{{path: not/there/v.jsonl}}]
  max_length: 64
  batch_size: 8
solver: {{name: scalebio}}
backend: {{name: torch, dtype: bfloat16, micro_batch_size: null}}
active: {{name: lisa}}
run: {{steps: 20, output: out}}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Family -> a recipe whose model is a config.json alone and whose data do not exist."""
    monkeypatch.chdir(tmp_path)

    def write(family: str = "llama") -> str:
        FAMILIES[family]().save_pretrained(tmp_path / family)
        (tmp_path / "recipe.yaml").write_text(RECIPE.format(model=family))
        return "recipe.yaml"

    return write


def plan(*words: str, expect: int = 0) -> str:
    done = CliRunner().invoke(app, ["plan", *words])
    assert done.exit_code == expect, (done.output, done.exception)
    return done.output


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_config_alone_can_be_planned(recipe, family: str) -> None:  # type: ignore[no-untyped-def]
    output = plan(recipe(family), "--json", "plan.json")
    found = json.loads(Path("plan.json").read_text())
    assert "fits: " in output
    assert found["fits"]
    assert found["gpu_bytes"] == sum(found["gpu"].values())
    assert found["gpu"]["activations"] > found["activations_otherwise"] > 0
    assert not Path("out").exists()


@pytest.mark.parametrize("lora", ["null", "{rank: 2}"])
@pytest.mark.parametrize("mean_over", ["rows", "tokens"])
def test_fine_tuning_can_be_planned(recipe, lora: str, mean_over: str) -> None:  # type: ignore[no-untyped-def]
    recipe("llama")
    Path("tune.yaml").write_text(
        "problem: {name: llm-finetuning, model: llama, data: not/there.jsonl, validation: [{path: nor/there.jsonl}], "
        f"lora: {lora}, mean_over: {mean_over}, max_length: 64, batch_size: 8}}\n"
        "solver: {name: descent}\nbackend: {name: torch, dtype: bfloat16}\nrun: {steps: 20, output: out}\n"
    )
    plan("tune.yaml", "--json", "plan.json")
    found = json.loads(Path("plan.json").read_text())
    assert found["fits"]
    assert (found["active"] < found["parameters"] / 2) == (lora != "null")


def test_what_does_not_fit_ends_with_1_and_the_settings_to_change(recipe) -> None:  # type: ignore[no-untyped-def]
    name = recipe()
    plan(name, "--json", "plan.json")
    needed = json.loads(Path("plan.json").read_text())["gpu_bytes"]
    small = ["--gpu-memory", str((needed - 1000) / 1e9)]
    output = plan(name, *small, "--json", "plan.json", expect=1)
    advice = json.loads(Path("plan.json").read_text())["advice"]["cheapest"]["set"]
    assert "does not fit" in output
    assert f"cheapest change that fits: {' '.join(advice)}" in output
    plan(name, *small, *" ".join(advice).split())
    chosen = plan(name, *small, "--set", "backend.micro_batch_size=auto")  # the most rows that fit, not all that there are
    assert "; torch, 1 row at a time" in chosen


def test_fewer_labels_need_less_memory(recipe) -> None:  # type: ignore[no-untyped-def]
    name, sizes = recipe(), []
    for share in ("1.0", "0.25"):
        plan(name, "--labelled-share", share, "--json", "plan.json")
        sizes.append(json.loads(Path("plan.json").read_text())["gpu"]["output, loss and working memory"])
    assert sizes[1] < 0.5 * sizes[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "2"], "the torch backend uses one device"),
        (["--mfu", "40"], "--mfu is the share of the peak"),
        (["--labelled-share", "0"], "the labelled share is a part of the tokens"),
        (["--set", "active.blocks=9"], "active.blocks is 9"),
        (["--set", "solver.name=odm", "--set", "problem={name: quadratic}"], "the solver ODM solves a LLMReweighting"),
        (["--set", "problem.model=nowhere/at-all"], "neither a directory"),
    ],
)
def test_what_cannot_be_planned_says_why(recipe, capsys, monkeypatch, words: list[str], message: str) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("sys.argv", ["bilevel", "plan", recipe(), *words])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert message in capsys.readouterr().err


PLAIN = """
problem: {problem}
solver: {{name: {solver}}}
backend: {{name: torch}}
run: {{steps: 3, output: out}}
"""
CALIBRATION = "{name: calibration, readings: [1.0, 2.0], references: [3.0, 5.0, 4.0]}"


@pytest.mark.parametrize(
    ("problem", "solver", "rows"),
    [
        ("{name: quadratic}", "scalebio", 3),
        ("{name: hyper-cleaning, rows: 40, validation_rows: 30}", "f2sa", 4 * 40 + 2 * 30),
        ("{name: ridge-reweighting, clean: 2, flipped: 1, rows: 5, validation_rows: 7}", "descent", 3 * 5 + 8 / 50 * 7),
        ("{name: ridge-reweighting, clean: 2, flipped: 1, rows: 5, validation_rows: 7}", "aid", 10 * 15 + 7 + 102 * 15),
        (CALIBRATION, "bome", 12 * 2 + 3),
    ],
)
def test_a_plain_problem_can_be_planned_with_any_solver(
    problem: str, solver: str, rows: float, plugins: Plugins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`rows` by the pass counts of the docs; the last one is a plugin's problem, which says nothing of its cost."""
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "third_party_plugin"))
    plugins.parts["problems"]["calibration"] = Part("calibration", "bilevel_calibration.problem:Calibration", "example")
    monkeypatch.setattr("bilevel.plugins.load_plugins", lambda: plugins)
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(PLAIN.format(problem=problem, solver=solver))
    output = plan("recipe.yaml", "--json", "plan.json")
    found = json.loads(Path("plan.json").read_text())
    assert "fits: " in output
    assert (found["units"], found["unit"]) == (rows, "rows")
    assert found["gpu"]["output, loss and working memory"] > 0
    assert not Path("out").exists()


def test_nothing_of_a_product_is_advised_for_a_plain_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(PLAIN.format(problem="{name: hyper-cleaning}", solver="f3sa"))
    output = plan("recipe.yaml", "--gpu-memory", "0.001", expect=1)
    assert "what is left is a solver without momentum (f2sa)" in output
    assert not any(word in output for word in ("max_length", "model", "token"))


def test_what_is_left_for_a_language_model_is_for_its_problem_to_say(recipe) -> None:  # type: ignore[no-untyped-def]
    output = plan(recipe(), "--gpu-memory", "0.001", expect=1)
    assert "what is left is a smaller model (problem.model), shorter rows (problem.max_length), larger GPUs or" in output


def test_shipped_recipes_plan_from_the_command_line(zero_plugins: Plugins, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bilevel.plugins.load_plugins", lambda: zero_plugins)
    monkeypatch.chdir(ROOT)
    output = plan(str(PLANS / "qwen2-7b" / "recipe.yaml"), "--gpus", "8", "--set", "problem.max_length=128")
    assert "each of 8 GPUs" in output
    assert "fits: " in output


def test_links_and_machines_are_options(zero_plugins: Plugins, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of a model of two blocks on two machines of two GPUs, with links that decide the time."""
    monkeypatch.setattr("bilevel.plugins.load_plugins", lambda: zero_plugins)
    monkeypatch.chdir(tmp_path)
    FAMILIES["llama"]().save_pretrained("llama")
    deepspeed = "backend: {name: deepspeed, dtype: bfloat16}"
    Path("recipe.yaml").write_text(
        RECIPE.format(model="llama").replace("backend: {name: torch, dtype: bfloat16, micro_batch_size: null}", deepspeed)
    )
    words = ["recipe.yaml", "--gpus", "4", "--gpus-per-node", "2", "--link", "0.01", "--node-link", "0.001"]
    output = plan(*words, "--json", "plan.json")
    found = json.loads(Path("plan.json").read_text())
    assert [found["hardware"][key] for key in ("link", "node_link", "gpus_per_node")] == [0.01, 0.001, 2]
    assert "CPU memory, all processes of a node" in output
    assert "quicker: --set backend.shard_group=2" in output
    assert found["quicker"]["step_seconds"] < 0.9 * found["step_seconds"]


def test_a_run_still_needs_weights(recipe, capsys, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("sys.argv", ["bilevel", "run", recipe()])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert "has no .safetensors file" in capsys.readouterr().err
