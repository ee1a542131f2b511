"""The command as a whole, on tiny models."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from transformers import AutoModelForCausalLM

from bilevel import InputError
from bilevel.errors import DamagedError
from bilevel.loop import Interrupted
from bilevel.report.comparison import difference_rows, read_comparison
from bilevel_backends.torch_backend import TorchBackend
from bilevel_llm.comparison import cell as cells
from bilevel_llm.evaluation.scores import evaluate
from bilevel_llm.reweighting.problem import LLMReweighting
from tests.bilevel_llm.comparison.conftest import bilevel
from tests.bilevel_llm.tiny import write_rows

Make = Callable[..., Path]


def comparison(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "comparison.json").read_text())
    return content


def cell(out: Path, method: str, seed: int = 0) -> dict[str, Any]:
    (found,) = (c for c in comparison(out)["cells"] if (c["method"], c["seed"]) == (method, seed))
    return found


def test_noise_in_the_mix_hurts_and_the_table_says_so(recipe: Make, tmp_path: Path) -> None:
    """Planted: the target is like `clean`, the others are not. Three seeds; each trains 8 steps."""
    shown = bilevel("compare", recipe(seeds=[0, 1, 2], rows=64, finetune={"lr": 2e-2, "batch_size": 8}))
    found = read_comparison(tmp_path / "out")
    assert found.methods == ["base", "uniform", "clean"]
    verdicts = {(row.method, row.metric): row for row in difference_rows(found)}
    better = verdicts["clean", "row_loss/target"]
    assert better.verdict == "better"
    assert better.interval.high < 0
    assert verdicts["base", "row_loss/target"].verdict == "worse"
    assert "not-finished" not in {f.name for f in found.all_findings()}  # rows are equal, and differ in length
    assert "clean - uniform" in shown
    assert f"{better.interval.mean:+.4f}" in shown
    bilevel("report", tmp_path / "out", "--output", tmp_path / "report.html")
    assert "row_loss/target" in (tmp_path / "report.html").read_text()


def test_scores_are_those_of_the_model_and_every_method_trains_equally_long(
    recipe: Make, tmp_path: Path, test_file: str
) -> None:
    out = tmp_path / "out"
    bilevel("compare", recipe(), "--keep-models")
    for method in ("uniform", "clean"):
        model = out / "cells" / method / "seed-0" / "model"
        (scores,) = evaluate(str(model), [test_file], max_length=64, device="cpu").values()
        found = cell(out, method)
        assert found["cost"]["finetuning"]["steps"] == 5
        assert found["mix"]["rows"] == 40
        if not comparison(out)["test"]["target"]["dropped"]:
            assert found["metrics"]["loss/target"] == pytest.approx(scores.loss, rel=1e-6)
            assert found["metrics"]["row_loss/target"] == pytest.approx(scores.row_loss, rel=1e-6)
            assert found["metrics"]["perplexity/target"] == pytest.approx(np.exp(scores.loss), rel=1e-6)
            assert found["metrics"]["token_accuracy/target"] == pytest.approx(scores.accuracy)
    assert cell(out, "clean")["mix"]["sources"] == {"clean": 40, "other": 0, "noise": 0}
    script = (out / "lm-eval.sh").read_text()
    assert f"pretrained={out / 'cells' / 'clean' / 'seed-0' / 'model'}" in script


def test_models_go_when_they_are_scored_unless_they_are_kept(recipe: Make, tmp_path: Path) -> None:
    bilevel("compare", recipe(methods=["uniform"]))
    assert list((tmp_path / "out").rglob("*.safetensors")) == []
    assert not (tmp_path / "out" / "lm-eval.sh").exists()


def test_equal_mixes_are_tuned_once(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    methods = [
        "uniform",
        *({"name": name, "weights": {"clean": 1, "other": w, "noise": w}} for name, w in (("thirds", 1), ("clean", 0))),
    ]
    tuned: list[str] = []
    export = cells.export_model

    def exported(run: Path, model: Path) -> None:
        tuned.append(f"{run.parents[1].name} {run.parent.name}")
        export(run, model)

    monkeypatch.setattr(cells, "export_model", exported)
    bilevel("compare", recipe(methods=methods, seeds=[0, 1]))
    assert tuned == ["uniform seed-0", "clean seed-0", "uniform seed-1", "clean seed-1"]
    uniform, thirds, clean = (tmp_path / "out" / "cells" / name for name in ("uniform", "thirds", "clean"))
    for name in ("scores.json", "tuning.json", "rows-target.npz"):
        assert (thirds / "seed-0" / name).read_bytes() == (uniform / "seed-0" / name).read_bytes()
        assert (clean / "seed-0" / name).read_bytes() != (uniform / "seed-0" / name).read_bytes() or name == "tuning.json"
    assert cell(tmp_path / "out", "thirds", 1)["metrics"] == cell(tmp_path / "out", "uniform", 1)["metrics"]


def test_a_budget_of_tokens_is_the_same_for_every_method(recipe: Make, tmp_path: Path) -> None:
    """To within a batch, 8 rows of 64 tokens at most, of which the last one is not cut."""
    bilevel("compare", recipe(rows=None, tokens=2000))
    for method in ("uniform", "clean"):
        assert 2000 - 64 <= cell(tmp_path / "out", method)["mix"]["tokens"] <= 2000
        assert 2000 <= cell(tmp_path / "out", method)["cost"]["size"] < 2000 + 8 * 64


def test_finished_cells_are_not_run_again_and_new_seeds_are(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bilevel("compare", recipe())
    first = comparison(tmp_path / "out")
    monkeypatch.setattr(cells, "score_model", lambda *a, **k: pytest.fail("scored again"))
    bilevel("compare", recipe())
    assert comparison(tmp_path / "out") == first
    monkeypatch.undo()
    bilevel("compare", recipe(seeds=[0, 1]))
    again = comparison(tmp_path / "out")
    assert {(c["method"], c["seed"]) for c in again["cells"]} >= {("clean", 0), ("clean", 1), ("uniform", 1)}
    assert [c for c in again["cells"] if c["seed"] == 0] == first["cells"]


def test_a_damaged_file_of_a_cell_is_named_before_anything_is_written(recipe: Make, tmp_path: Path) -> None:
    bilevel("compare", recipe(methods=["uniform"]))
    out = tmp_path / "out"
    cell = out / "cells" / "uniform" / "seed-0"
    for name, damaged in [
        ("weights.json", b"[1]"), ("mix.jsonl.json", b"{}"), ("tuning.json", b"\xff"), ("scores.json", b"{}"),
        ("rows-target.npz", (cell / "rows-target.npz").read_bytes()[:99]),
    ]:  # fmt: skip
        whole = (cell / name).read_bytes()
        (cell / name).write_bytes(damaged)
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        with pytest.raises(DamagedError, match=rf"{name}.*; remove .*seed-0, and all that it held is made again"):
            bilevel("compare", tmp_path / "recipe.yaml")
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
        (cell / name).write_bytes(whole)


@pytest.mark.parametrize(
    ("file", "damaged"),
    [
        ("selection.jsonl", "{"),
        ("selection.jsonl", "1"),
        ("selection.jsonl", '{"source": "clean", "file": "x"}'),
        ("weights.json", '"selection": 3'),
        ("weights.json", '"selection": {}'),
    ],
)
def test_a_damaged_selection_is_named(recipe: Make, tmp_path: Path, file: str, damaged: str) -> None:
    bilevel("baseline", "uniform", recipe(), "--output", tmp_path / "run")
    weights = json.loads((tmp_path / "run" / "weights.json").read_text()) | {"selection": {"file": "selection.jsonl"}}
    if file == "weights.json":
        weights |= json.loads(f"{{{damaged}}}")
    (tmp_path / "run" / "weights.json").write_text(json.dumps(weights))
    (tmp_path / "run" / "selection.jsonl").write_text(damaged + "\n")
    with pytest.raises(InputError, match=rf"{file}(:1)?: "):
        bilevel("compare", recipe(methods=[{"name": "chosen", "run": str(tmp_path / "run")}]))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("stage", "call"), [("make_mix", 3), ("export_model", 2), ("score_model", 2)])
def test_stopped_anywhere_it_ends_as_if_it_had_not_been(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, call: int
) -> None:
    """Ctrl-C within a stage of a cell, with others finished. (The first mix is drawn by the check before the start.)"""
    methods = [{"name": "clean", "weights": {"clean": 1, "other": 0, "noise": 0}}, "learned"]
    bilevel("compare", recipe(methods=methods), "--output", tmp_path / "whole")
    calls = []
    real = getattr(cells, stage)

    def stop(*words: Any, **settings: Any) -> Any:
        calls.append(stage)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*words, **settings)

    monkeypatch.setattr(cells, stage, stop)
    with pytest.raises(Interrupted, match="the same command resumes it"):
        bilevel("compare", recipe(methods=methods), "--output", tmp_path / "cut")
    monkeypatch.undo()
    bilevel("compare", recipe(methods=methods), "--output", tmp_path / "cut")
    for one, other in zip(comparison(tmp_path / "whole")["cells"], comparison(tmp_path / "cut")["cells"], strict=True):
        assert one["metrics"] == other["metrics"]
        assert one.get("weights") == other.get("weights")


def test_a_run_of_fine_tuning_that_was_stopped_goes_on(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its recipe and a checkpoint are there, and `tuning.json` is not."""
    bilevel("compare", recipe(), "--output", tmp_path / "whole")
    monkeypatch.setattr(cells, "export_model", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(Interrupted):
        bilevel("compare", recipe(), "--output", tmp_path / "cut")
    monkeypatch.undo()
    steps = (tmp_path / "cut" / "cells" / "uniform" / "seed-0" / "tuned" / "metrics.jsonl").read_text()
    bilevel("compare", recipe(), "--output", tmp_path / "cut")
    assert (tmp_path / "cut" / "cells" / "uniform" / "seed-0" / "tuned" / "metrics.jsonl").read_text() == steps
    assert cell(tmp_path / "cut", "uniform")["metrics"] == cell(tmp_path / "whole", "uniform")["metrics"]


def test_learned_weights_are_those_of_the_run_and_its_directory_does_as_well(recipe: Make, tmp_path: Path) -> None:
    file = recipe(methods=["uniform", "learned"], seeds=[3])
    tree = yaml.safe_load(file.read_text())  # with the section `compare`, which `run` leaves alone
    tree["run"] |= {"output": str(tmp_path / "run"), "seed": 3}
    (tmp_path / "alone.yaml").write_text(yaml.safe_dump(tree))
    bilevel("run", tmp_path / "alone.yaml")
    learned = json.loads((tmp_path / "run" / "weights.json").read_text())["average"]
    assert len(set(learned.values())) > 1
    bilevel("compare", file)
    assert cell(tmp_path / "out", "learned", 3)["weights"] == learned
    cost = cell(tmp_path / "out", "learned", 3)["cost"]
    assert cost["weights"]["tokens"] > 0
    assert cost["gpu_seconds"] == pytest.approx(cost["weights"]["seconds"] + cost["finetuning"]["seconds"], abs=1e-3)
    again = recipe(methods=["uniform", {"name": "learned", "run": str(tmp_path / "run")}], seeds=[3])
    bilevel("compare", again, "--output", tmp_path / "again")
    assert cell(tmp_path / "again", "learned", 3)["metrics"] == cell(tmp_path / "out", "learned", 3)["metrics"]


def test_selected_rows_are_the_only_ones_that_are_trained_on(recipe: Make, tmp_path: Path) -> None:
    """less selects 10 of 94 rows; 40 are drawn, each 4 times."""
    bilevel("compare", recipe(methods=["uniform", {"name": "less", "share": 0.107, "warmup_steps": 1}]))
    where = tmp_path / "out" / "cells" / "less" / "seed-0"
    lines = (where / "weights" / "selection.jsonl").read_text().splitlines()
    selected = {(row["file"], row["number"]) for row in map(json.loads, lines)}
    mixed = [json.loads(line)["_bilevel"] for line in (where / "mix.jsonl").read_text().splitlines()]
    assert len(selected) == 10
    assert {(row["file"], row["row"]) for row in mixed} == selected
    assert len(mixed) == 40


def test_test_rows_are_never_trained_on(recipe: Make, data: dict[str, str], tmp_path: Path, test_file: str) -> None:
    """Rows of the sources and of the validation data are taken out of the test, which would not be one with them."""
    lines = [Path(data[name]).read_text().splitlines()[0] for name in ("clean", "target")]
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("\n".join(lines) + "\n" + Path(test_file).read_text())
    before = recipe()
    bilevel("compare", before)
    bilevel("compare", recipe(test=[{"name": "target", "path": str(mixed)}]), "--output", tmp_path / "more")
    without, with_ = (comparison(where)["test"]["target"] for where in (tmp_path / "out", tmp_path / "more"))
    assert with_["dropped"] == without["dropped"] + 2
    assert cell(tmp_path / "more", "clean")["metrics"] == pytest.approx(cell(tmp_path / "out", "clean")["metrics"])
    assert any(f["name"] == "rows-dropped" for f in comparison(tmp_path / "more")["findings"])
    assert with_["rows"] == without["rows"] == 32 - with_["dropped"]


def test_another_model_may_be_tuned_than_the_weights_were_learned_on(
    recipe: Make, tmp_path: Path, model_directory: Callable[[str], Path]
) -> None:
    bilevel("compare", recipe(model=str(model_directory("gpt2"))), "--keep-models")
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "cells" / "clean" / "seed-0" / "model")
    assert tuned.config.model_type == "gpt2"


@pytest.mark.parametrize(
    ("compare", "message"),
    [
        ({"methods": ["unifrom"]}, r"no baseline is named 'unifrom'; did you mean 'uniform'\?"),
        ({"methods": []}, "methods: name at least one"),
        ({"methods": ["uniform", "uniform"]}, "two methods are called 'uniform'"),
        ({"methods": [{"name": "less", "shar": 1}]}, r"unknown key compare\.methods\.0\.shar; did you mean 'share'\?"),
        ({"methods": [{"name": "t", "weights": {"clean": 1}}]}, "the source 'other' has no weight"),
        ({"methods": [{"name": "t", "run": "nowhere"}]}, "nowhere is not a run"),
        ({"methods": [{"name": "temperature", "temperature": -1}]}, "temperature must be positive"),
        ({"seeds": []}, "seeds: name at least one"),
        ({"seeds": [1, 1]}, "seeds 1 is given twice"),
        ({"tokens": 100}, "rows or in tokens, and not both"),
        ({"rows": 400}, r"uniform: all sources together can give \d+ rows, not 400"),
        ({"rows": 100, "on_shortfall": "error", "methods": [{"name": "n", "weights": {"clean": 0, "other": 0, "noise": 1}}]},
         "the mix needs 100 rows of 'noise', which has 24"),
        ({"methods": [{"name": "less", "share": 0.05}]}, "compare.rows is 40, and less can draw 20 at most"),
        ({"methods": [{"name": "less", "share": 0.05}], "rows": None, "tokens": 9000}, r"compare.tokens is 9,000, and the 5 rows that less"),
        ({"on_shortfall": "report"}, "compare.on_shortfall is 'report'"),
        ({"test": [{"path": "no-such.jsonl"}]}, "no such file: no-such.jsonl"),
        ({"test": [{"path": "no-such.jsonl", "name": "x" * 181}]}, r"compare\.test\.0: name: longer than 180 bytes"),
        ({"test": []}, "test: name at least one held-out set"),
        ({"reference": "unifor"}, "compare.reference is 'unifor'.*did you mean 'uniform'"),
        ({"finetune": {"lrr": 1}}, "unknown key compare.finetune.lrr"),
        ({"finetune": {"batch_size": 41}}, "batch_size is 41, and a mix has 40 rows"),
        ({"finetune": {"steps": 3, "epochs": 1}}, "epochs and steps are given"),
        ({"finetune": {"active": {"blocks": 1}}}, "active is for the method 'lisa'"),
        ({"finetune": {"method": "lisa", "active": {"blok": 1}}}, "active has no key 'blok'"),
        ({"model": "no/such"}, "'no/such' is neither"),
        ({"test_sets": []}, r"unknown key compare\.test_sets"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_work_starts(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compare: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(LLMReweighting, "lower", lambda self: pytest.fail("a model was loaded"))
    monkeypatch.setattr(cells, "score_model", lambda *a, **k: pytest.fail("a model was loaded"))
    with pytest.raises(InputError, match=message):
        bilevel("compare", recipe(**compare))
    assert not (tmp_path / "out").exists()


def test_test_rows_that_stand_elsewhere_can_be_refused(recipe: Make, data: dict[str, str]) -> None:
    test = [{"name": "target", "path": data["target"]}]
    with pytest.raises(InputError, match=r"30 of 30 rows .* the validation set 'validation'.*nothing is left to test on"):
        bilevel("compare", recipe(test=test))
    with pytest.raises(InputError, match=r"set compare\.on_overlap=drop"):
        bilevel("compare", recipe(test=test, on_overlap="error"))


def test_a_changed_recipe_is_refused_with_the_key_that_changed(recipe: Make, tmp_path: Path, test_file: str) -> None:
    hot = [{"name": "temperature", "temperature": 2}]
    bilevel("compare", recipe(methods=["uniform", *hot]))
    with pytest.raises(InputError, match=r"compare\.finetune\.lr was 0\.01 and is now 0\.02"):
        bilevel("compare", recipe(methods=["uniform", *hot]), "--set", "compare.finetune.lr=0.02")
    with pytest.raises(InputError, match=r"the method temperature\.temperature was 2\.0 and is now 3\.0"):
        bilevel("compare", recipe(methods=["uniform", {"name": "temperature", "temperature": 3}]))
    fewer = write_rows(tmp_path / "fewer.jsonl", [json.loads(line) for line in Path(test_file).read_text().splitlines()[:9]])
    file = recipe(methods=["uniform", *hot], test=[{"name": "target", "path": fewer}])
    with pytest.raises(InputError, match=r"compare\.test\.0\.path was"):
        bilevel("compare", file)


def test_a_directory_of_something_else_is_left_alone(recipe: Make, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(InputError, match="is not empty"):
        bilevel("compare", recipe())


def test_exact_match_is_measured_where_it_is_asked_for(recipe: Callable[..., Path], tmp_path: Path) -> None:
    """Trained on one answer to everything, the tiny model gives it: half of the test rows are right."""
    same = [{"instruction": f"{i}+1?", "output": "7"} for i in range(48)]
    sums = write_rows(tmp_path / "sums.jsonl", same)
    test = write_rows(tmp_path / "t.jsonl", [{"instruction": f"{i}?", "output": f"{7 + i % 2}"} for i in range(8)])
    file = recipe(
        rows=96, methods=["uniform", {"name": "sums", "weights": {"clean": 0, "other": 0, "noise": 1}}], max_new_tokens=8,
        finetune={"lr": 2e-2, "batch_size": 8, "epochs": 3},
        test=[{"name": "math", "path": test, "metrics": ["exact_match"]}],
    )  # fmt: skip
    bilevel("compare", file, "--set", f"problem.sources.2.path={sums}")
    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    found = {c["method"]: c["metrics"] for c in content["cells"]}
    answers = (tmp_path / "out" / "cells" / "sums" / "seed-0" / "answers-math.jsonl").read_text().splitlines()
    assert [json.loads(line)["answer"] for line in answers] == ["7"] * 8
    assert found["sums"] == {"exact_match/math": 0.5}
    assert found["base"] == {"exact_match/math": 0.0}
    assert np.isclose(
        content["differences"][0]["mean"], found["base"]["exact_match/math"] - found["uniform"]["exact_match/math"]
    )


@pytest.mark.usefixtures("installed")
def test_a_baseline_of_another_package_is_compared_like_our_own(recipe: Make, tmp_path: Path) -> None:
    """It selects rows, and says so only by what every baseline says: the mix is drawn from the selected rows alone."""
    methods = ["uniform", {"name": "shortest", "count": 20}]
    with pytest.raises(InputError, match="shortest"):
        bilevel("compare", recipe(rows=100, methods=methods))
    bilevel("compare", recipe(rows=20, methods=methods))
    where = tmp_path / "out" / "cells" / "shortest" / "seed-0"
    lines = (where / "weights" / "selection.jsonl").read_text().splitlines()
    selected = {(row["file"], row["number"]) for row in map(json.loads, lines)}
    assert len(selected) == 20
    card = json.loads((where / "weights.json").read_text())
    assert sum(map(len, card["selection"].values())) == 20
    assert cell(tmp_path / "out", "shortest")["metrics"]


@pytest.mark.usefixtures("installed")
def test_a_baseline_of_another_package_has_the_command_of_our_own(recipe: Make, tmp_path: Path) -> None:
    shown = bilevel("baseline", "shortest", recipe(), "--set", "baseline.count=7")
    assert "selected" in shown
    learned = json.loads((tmp_path / "out" / "weights.json").read_text())
    assert learned["method"] == {"name": "shortest", "count": 7}
    assert learned["selection"]["rows"] == 7


def test_baselines_train_with_the_step_size_of_the_recipe(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is part of what a method does: cells made with another one are not mixed with these. A stopped swarm is resumed."""
    methods = ["uniform", "doremi", {"name": "swarm", "runs": 5, "steps": 2}]
    original, calls = TorchBackend.assign, [0]

    def stop(self: Any, *variables: Any) -> None:
        calls[0] += 1
        if calls[0] == 4:  # at the start of the fourth run
            raise KeyboardInterrupt
        original(self, *variables)

    monkeypatch.setattr(TorchBackend, "assign", stop)
    every = ("--set", "run.checkpoint_every=1")
    with pytest.raises(Interrupted, match="the same command resumes it"):
        bilevel("compare", recipe(methods=methods), *every)
    calls[0] = -10
    bilevel("compare", recipe(methods=methods), *every)
    assert calls[0] == -10 + 2, "three of five runs were done"
    for name in ("doremi", "swarm"):
        where = tmp_path / "out" / "cells" / name
        assert json.loads((where / "method.json").read_text())["lr"] == 1e-3
        found = cell(tmp_path / "out", name)
        assert found["metrics"]
        assert sum(found["weights"].values()) == pytest.approx(1)
    findings = [f["sentence"] for f in comparison(tmp_path / "out")["findings"]]
    assert any("too few to tell whether it has learned anything" in sentence for sentence in findings)
    with pytest.raises(InputError, match=r"the method doremi\.lr was 0\.001 and is now 0\.002"):
        bilevel("compare", recipe(methods=methods), "--set", "solver.lr_z=2e-3")
