import json
import math
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bilevel import LISA, SGD, AdamW, InputError, ScaleBiO, fit
from bilevel.answer import command_line
from bilevel.data import generator
from bilevel_backends.torch_backend import TorchBackend
from bilevel_llm.data.settings import Source, ValidationSet
from bilevel_llm.reweighting.next_steps import next_steps
from bilevel_llm.reweighting.problem import LLMReweighting
from tests.bilevel_llm.tiny import FAMILIES, sentences, write_rows

Make = Callable[..., LLMReweighting]


def gradients(problem: LLMReweighting, **settings: Any) -> dict[str, Tensor]:
    """Gradients of x and y for the three passes of a step, as the solver asks for them."""
    backend = TorchBackend(device="cpu", **settings)
    backend.start(seed=3)
    x = backend.place("x", problem.upper, AdamW(), sharded=False)
    y = backend.place("y", problem.lower, AdamW(), sharded=True, blocks=problem.blocks)
    with torch.no_grad():
        x.module.logits.add_(torch.linspace(-1, 1, len(x.module.logits)))
    backend.activate(y, y.blocks.names)
    shard = backend.shard
    backend.backward(lambda b: problem.lower_loss(x, y, b), problem.lower_batch(5, shard), wrt={x: 10.0, y: 1.0})
    backend.backward(lambda b: problem.upper_loss(x, y, b), problem.upper_batch(5, shard), wrt={x: 1.0, y: 0.1})
    found = {f"x.{name}": g for name, g in x.gradients.items()} | {f"y.{name}": g for name, g in y.gradients.items()}
    backend.close()
    return found


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 8])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_gradients_do_not_depend_on_the_micro_batch_size(problem: Make, family: str, micro_batch_size: int) -> None:
    """1e-5 relative to each tensor's largest entry, in float32: what differs is the order of summation."""
    whole = gradients(problem(family, prior_strength=0.3))
    parts = gradients(problem(family, prior_strength=0.3), micro_batch_size=micro_batch_size)
    assert whole.keys() == parts.keys()
    for name, gradient in whole.items():
        assert (gradient - parts[name]).abs().max() <= 1e-5 * gradient.abs().max(), name


def test_gradients_do_not_depend_on_padding(problem: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gradients(problem())
    original = LLMReweighting.lower_batch

    def padded(self: LLMReweighting, index: int, shard: Any) -> Any:
        out = []
        for b in original(self, index, shard):
            ids = F.pad(b.ids, (0, 7), value=11)  # any token may stand there
            out.append(replace(b, ids=ids, positions=b.positions + b.positions // b.ids.shape[1] * 7))
        return out

    monkeypatch.setattr(LLMReweighting, "lower_batch", padded)
    for name, gradient in gradients(problem()).items():
        assert (gradient - whole[name]).abs().max() <= 1e-5 * gradient.abs().max(), name


@pytest.mark.parametrize("world_size", [2, 5])
def test_gradients_summed_over_processes_are_those_of_one(
    problem: Make, monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    whole = gradients(problem())
    usual = TorchBackend.shard.fget
    total: dict[str, Tensor] = {}
    for rank in range(world_size):
        shard = property(lambda self, rank=rank: replace(usual(self), rank=rank, world_size=world_size))  # type: ignore[misc]
        monkeypatch.setattr(TorchBackend, "shard", shard)
        for name, gradient in gradients(problem(), micro_batch_size=2).items():
            total[name] = total.get(name, 0) + gradient
    for name, gradient in whole.items():
        assert (gradient - total[name]).abs().max() <= 1e-5 * gradient.abs().max(), name


def test_losses_are_what_a_row_by_row_reference_computes(problem: Make) -> None:
    """Σ_i p_i · mean over rows · mean over labelled tokens, one row at a time through the plain model."""
    p = problem()
    p.prepare()
    backend = TorchBackend(device="cpu", micro_batch_size=3)
    backend.start(seed=3)
    x = backend.place("x", p.upper, AdamW(), sharded=False)
    y = backend.place("y", p.lower, AdamW(), sharded=True, blocks=p.blocks)
    found = backend.evaluate(lambda b: p.lower_loss(x, y, b), p.lower_batch(2, backend.shard))
    by_source: dict[str, list[float]] = {name: [] for name in ("clean", "other", "noise")}
    for source, row in p._lower_sampler.batch(2, seed=3):
        name = list(by_source)[source]
        ids, labels = (torch.from_numpy(part) for part in p._train[name].row(row))
        logits = y.module.model(input_ids=ids[None].long()).logits[0]
        losses = F.cross_entropy(logits[:-1], ids[1:].long(), reduction="none")
        by_source[name].append(float(losses[labels[1:]].mean()))
    means = {name: sum(values) / len(values) for name, values in by_source.items()}
    assert found.value == pytest.approx(sum(means.values()) / 3, rel=1e-5)
    for name, mean in means.items():
        assert found.parts[name] == pytest.approx(mean, rel=1e-5)
    backend.close()


def test_the_gradient_of_the_logits_is_that_of_the_softmax_weighted_losses(problem: Make) -> None:
    p = problem(floor=0.1)
    backend = TorchBackend(device="cpu")
    backend.start(seed=3)
    x = backend.place("x", p.upper, AdamW(), sharded=False)
    y = backend.place("y", p.lower, AdamW(), sharded=True, blocks=p.blocks)
    result = backend.backward(lambda b: p.lower_loss(x, y, b), p.lower_batch(0, backend.shard), wrt={x: 2.0})
    losses = torch.tensor(list(result.parts.values()), dtype=torch.float64)
    s = torch.softmax(x.module.logits, 0)
    expected = 2.0 * (1 - 3 * 0.1) * (s * losses - s * (s @ losses))
    torch.testing.assert_close(x.gradients["logits"], expected, rtol=1e-4, atol=1e-6)
    backend.close()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_does_one_full_step(problem: Make, family: str) -> None:
    """Blocks are found, half the model is frozen bit for bit, weights and both replicas move, all is finite."""
    p = problem(family)
    solver = ScaleBiO(penalty=2.0, lr_x=0.1, lr_z=1e-3, warmup=1)
    result = fit(p, solver, TorchBackend(device="cpu", micro_batch_size=4), steps=4, active=LISA(blocks=1, period=2))
    assert {len(record.active) for record in result.history} == {1}
    assert all(block.startswith("model.") for record in result.history for block in record.active)
    assert result.history[-1].upper != result.history[0].upper
    assert math.isclose(sum(result.history[-1].upper.values()), 1, rel_tol=1e-6)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_blocks_of_every_family_cover_it_once(problem: Make, family: str) -> None:
    p = problem(family)
    module = p.lower()
    blocks = p.blocks(module)
    assert len(blocks.repeated) == 3
    assert sorted(blocks.parameters(blocks.names)) == sorted(name for name, _ in module.named_parameters())
    tied = family in ("llama-tied", "gpt2", "gemma2")
    assert blocks.head_is_embedding == tied
    assert ("head" in blocks.members) != tied


def test_logits_at_the_labels_are_those_of_the_whole_model(problem: Make) -> None:
    """Whatever the architecture does to its logits (gemma2 caps them) is done to the picked ones as well."""
    for family in ("gemma2", "gpt-neox"):
        module = problem(family).lower()
        ids = torch.from_numpy(generator(0, 0).integers(0, 256, (2, 9)))
        positions = torch.tensor([3, 8, 12])
        with torch.no_grad():
            whole = module.model(input_ids=ids).logits.flatten(0, 1)[positions]
            torch.testing.assert_close(module(ids, positions), whole, rtol=1e-4, atol=1e-5)


def test_dropout_is_off(problem: Make) -> None:
    """The llama of these tests is configured with attention dropout 0.5."""
    module = problem("llama").lower()
    ids, positions = torch.arange(20)[None], torch.tensor([10])
    assert torch.equal(module(ids, positions), module(ids, positions))


def test_weights_start_where_asked_and_respect_the_floor(problem: Make) -> None:
    def start(**settings: Any) -> list[float]:
        return problem(**settings).upper()().tolist()

    assert start() == pytest.approx([1 / 3] * 3)
    assert start(initial="size") == pytest.approx([40 / 94, 30 / 94, 24 / 94])
    assert start(initial={"clean": 2, "other": 1, "noise": 1}, floor=0.05) == pytest.approx([0.5, 0.25, 0.25])
    module = problem(floor=0.1).upper()
    with torch.no_grad():
        module.logits.copy_(torch.tensor([100.0, 0.0, -100.0]))
    assert module().tolist() == pytest.approx([0.8, 0.1, 0.1])


def test_the_prior_pulls_and_its_pull_is_added_once_a_batch(problem: Make) -> None:
    values = {}
    for strength in (0.0, 0.7):
        p = problem(initial={"clean": 2, "other": 1, "noise": 1}, prior_strength=strength)
        backend = TorchBackend(device="cpu", micro_batch_size=3)
        backend.start(seed=0)
        x = backend.place("x", p.upper, AdamW(), sharded=False)
        y = backend.place("y", p.lower, AdamW(), sharded=True, blocks=p.blocks)
        values[strength] = backend.evaluate(lambda b: p.upper_loss(x, y, b), p.upper_batch(0, backend.shard)).value
        backend.close()
    divergence = 0.5 * math.log(1.5) + 0.5 * math.log(0.75)
    assert values[0.7] - values[0.0] == pytest.approx(0.7 * divergence, rel=1e-4)


def test_the_command_to_go_on_names_of_a_validation_set_what_it_says(
    problem: Make, data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(data["target"]).parent)
    p = problem(validation=[ValidationSet("target.jsonl", "goal", max_rows=20)])
    p.prepare()
    finetune = next(step for step in next_steps(p, {"clean": 1.0, "other": 0.0, "noise": 0.0}) if "finetune" in step.words)
    line = command_line(finetune.words, tmp_path / "run", here=Path("/elsewhere"))
    asked = shlex.split(line)
    (said,) = json.loads(next(word for word in asked if word.startswith("problem.validation=")).partition("=")[2])
    assert said == {"path": "/elsewhere/target.jsonl", "name": "goal", "max_rows": 20}


def test_several_validation_sets_count_by_their_weights(problem: Make, data: dict[str, str]) -> None:
    sets = [ValidationSet(data["target"], "one", weight=3.0), ValidationSet(data["noise"], "two", weight=1.0)]
    p = problem(validation=sets)
    backend = TorchBackend(device="cpu")
    backend.start(seed=0)
    x = backend.place("x", p.upper, AdamW(), sharded=False)
    y = backend.place("y", p.lower, AdamW(), sharded=True, blocks=p.blocks)
    found = backend.evaluate(lambda b: p.upper_loss(x, y, b), p.upper_batch(0, backend.shard))
    assert found.value == pytest.approx(0.75 * found.parts["one"] + 0.25 * found.parts["two"], rel=1e-6)
    backend.close()


def test_learned_weights_find_the_source_that_serves_the_target(problem: Make) -> None:
    """A model small enough to be trained within seconds; the target is written like `clean`."""
    solver = ScaleBiO(penalty=2.0, lr_x=0.1, lr_z=3e-3, optimizer_x=AdamW(betas=(0.9, 0.99)), warmup=30)
    result = fit(problem(batch_size=12), solver, TorchBackend(device="cpu"), steps=110)
    weights = result.history[-1].upper
    assert weights["clean"] > 0.5
    assert weights["clean"] > 2 * max(weights["other"], weights["noise"])


def test_weights_json_says_what_was_learned_and_from_what(problem: Make, tmp_path: Path) -> None:
    result = fit(
        problem(), ScaleBiO(lr_z=1e-3, warmup=2), TorchBackend(device="cpu"), steps=5, output=tmp_path / "run", seed=9
    )
    written = json.loads((tmp_path / "run" / "weights.json").read_text())
    assert written["sources"] == result.history[-1].upper
    assert written["steps"] == 5
    assert written["seed"] == 9
    logits = torch.tensor(list(written["logits"].values()), dtype=torch.float64)
    assert torch.softmax(logits, 0).tolist() == pytest.approx(list(written["sources"].values()), rel=1e-6)
    assert [len(values) for values in written["trajectory"].values()] == [5, 5, 5]
    assert written["data"]["sources"]["clean"]["rows"] == 40
    assert written["data"]["validation"]["validation"]["rows"] == 30
    assert len(written["data"]["sources"]["clean"]["hash"]) == len(written["model"]["hash"]) == 64


def test_an_interrupted_run_ends_with_the_same_weights_file(problem: Make, tmp_path: Path) -> None:
    """Bit for bit, in bfloat16 with LISA, cut in the warm-up and again after a switch of blocks."""

    def go(where: str, steps: int, resume: bool = False) -> bytes:
        backend = TorchBackend(device="cpu", dtype="bfloat16", micro_batch_size=4)
        solver = ScaleBiO(penalty=2.0, lr_z=1e-3, warmup=4)
        active = LISA(blocks=1, period=3)
        fit(problem(), solver, backend, steps=steps, active=active, output=tmp_path / where, resume=resume)
        return (tmp_path / where / "weights.json").read_bytes()

    whole = go("whole", 12)
    go("cut", 3)
    go("cut", 8, resume=True)
    assert go("cut", 12, resume=True) == whole


def test_tokens_are_made_once_and_shared(problem: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    problem().prepare()
    monkeypatch.setattr("bilevel_llm.data.tokens._build", lambda *a: pytest.fail("tokenized again"))
    problem().prepare()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sources": [Source("one", "x")]}, "at least two are needed"),
        ({"sources": [Source("one", "x"), Source("one", "y")]}, "name 'one' is used twice"),
        ({"validation": []}, "validation: at least one"),
        ({"max_length": 1}, "max_length must be at least 2"),
        ({"floor": 0.4}, "floor must be"),
        ({"prior_strength": -1.0}, "prior_strength"),
        ({"validation": [ValidationSet("x", weight=0.0)]}, "weight must be positive"),
    ],
)
def test_settings_that_make_no_sense_are_refused_at_once(problem: Make, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        problem(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "no/such-model"}, r"problem\.model: 'no/such-model' is neither"),
        ({"model": "no-such.gguf"}, r"there is no GGUF file"),
        ({"batch_size": 2}, "set batch_size to at least 3"),
        ({"batch_size": 100}, r"'other' has 30 usable rows.*needs 34"),
        ({"initial": {"clean": 1.0}}, r"problem\.initial: 'noise' is missing"),
        ({"initial": {"clean": 1.0, "other": 1.0, "noise": 0.0}}, "every weight must be positive"),
        ({"prior": {"clean": 1, "other": 1, "noise": 1, "more": 1}, "prior_strength": 1.0}, "'more' is not a source"),
        ({"max_length": 5}, r"clean\.jsonl:1.*raise max_length"),
    ],
)
def test_what_can_be_checked_before_the_model_is_loaded_is(
    problem: Make, monkeypatch: pytest.MonkeyPatch, settings, message: str
) -> None:  # type: ignore[no-untyped-def]
    p = problem(**settings)
    monkeypatch.setattr(LLMReweighting, "lower", lambda self: pytest.fail("the model was loaded"))
    with pytest.raises(InputError, match=message):
        fit(p, ScaleBiO(), TorchBackend(device="cpu"), steps=2)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  sources:", "  source:", r"recipe\.yaml:4: unknown key problem\.source; did you mean 'sources'"),
        ("{name: a, path", "{nam: a, path", r"recipe\.yaml:5: .*problem\.sources\.0\.nam"),
        ("{name: b,", "{name: a,", r"recipe\.yaml:1: .*'a' is used twice"),
        ("    - {name: b, path: y.jsonl}\n", "", "at least two are needed"),
        ("batch_size: 4", "batch_size: four", r"recipe\.yaml:9: problem\.batch_size is 'four'"),
        (
            "max_length: 64",
            "max_length: 64\n  on_overlap: ignore",
            r"recipe\.yaml:9: problem\.on_overlap is 'ignore'.*'report'",
        ),
        ("path: x.jsonl", "path: no/such/*.jsonl", r"no/such/\*\.jsonl"),
    ],
)
def test_a_recipe_s_mistakes_are_found_before_a_model_is_loaded(  # type: ignore[no-untyped-def]
    plugins, monkeypatch: pytest.MonkeyPatch, model_directory, tmp_path: Path, old: str, new: str, message: str
) -> None:
    from bilevel.config import load_config

    recipe = f"""problem:
  name: llm-reweighting
  model: {model_directory("llama")}
  sources:
    - {{name: a, path: x.jsonl}}
    - {{name: b, path: y.jsonl}}
  validation: [{{path: z.jsonl}}]
  max_length: 64
  batch_size: 4
solver: {{name: scalebio}}
backend: {{name: torch, device: cpu}}
run: {{steps: 2, output: out}}
"""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("xyz"):
        write_rows(tmp_path / f"{name}.jsonl", sentences(seed, 12))
    monkeypatch.setattr(LLMReweighting, "lower", lambda self: pytest.fail("the model was loaded"))
    assert old in recipe
    (tmp_path / "recipe.yaml").write_text(recipe.replace(old, new))
    with pytest.raises(InputError, match=message):
        load_config(tmp_path / "recipe.yaml", plugins).fit()
    assert not (tmp_path / "out").exists()


def test_a_directory_that_is_not_a_model_is_said(problem: Make, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no config.json"):
        problem(model=str(tmp_path)).prepare()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(InputError, match=r"no \.safetensors file"):
        problem(model=str(tmp_path)).prepare()
    file = tmp_path / "weights.txt"
    file.write_text("")
    with pytest.raises(InputError, match="is a file"):
        problem(model=str(file)).prepare()


def test_validation_rows_among_the_training_rows_are_reported_or_refused(
    problem: Make, data: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    leaking = write_rows(tmp_path / "leak.jsonl", sentences(5, 20) + sentences(4, 30)[:7])
    sources = [Source("clean", data["clean"]), Source("leaking", leaking), Source("noise", data["noise"])]
    with caplog.at_level("WARNING", logger="bilevel"):
        problem(sources=sources).prepare()
    assert "leaking" in caplog.text
    with pytest.raises(InputError, match=r"leaking.*on_overlap=report"):
        problem(sources=sources, on_overlap="error").prepare()


def test_truncated_and_unusable_rows_are_counted(
    problem: Make, data: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="bilevel"):
        problem(max_length=50).prepare()
    assert "cut at 50 tokens" in caplog.text


def test_code_of_a_model_directory_is_not_run(problem: Make, model_directory: Callable[[str], Path], tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "remote"
    shutil.copytree(model_directory("llama"), copy)
    config = json.loads((copy / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}
    config["model_type"] = "evil"
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(InputError, match="cannot be loaded"):
        problem(model=str(copy)).lower()
    assert not (tmp_path / "ran").exists()


def test_sgd_on_every_variable_works_too(problem: Make) -> None:
    solver = ScaleBiO(penalty=2.0, lr_x=1.0, lr_z=0.1, optimizer_x=SGD(), optimizer_z=SGD(clip=1.0), warmup=1)
    history = fit(problem(), solver, TorchBackend(device="cpu"), steps=3).history
    assert history[-1].upper != history[0].upper
