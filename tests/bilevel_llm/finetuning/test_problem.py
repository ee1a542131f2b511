"""What is trained, on what, and that it is what a plain training loop does."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from bilevel import LISA, SGD, AdamW, Descent, InputError, fit
from bilevel.checkpoint import SavedVariable
from bilevel_llm.data.settings import ValidationSet
from bilevel_llm.finetuning.problem import FineTuning
from bilevel_llm.model.language_model import LanguageModel
from bilevel_llm.model.lora import LoRA
from tests.bilevel_llm.tiny import Keeping, sentences, train, write_rows

Make = Callable[..., FineTuning]


def plain_loop(problem: FineTuning, optimizer: Any, steps: int, clip: float) -> tuple[dict[str, Tensor], list[float]]:
    """transformers and torch alone: right-padded batches, labels of -100, an attention mask, the library's loss."""
    model = AutoModelForCausalLM.from_pretrained(problem.model).eval()
    optimizer = optimizer(model.parameters())
    losses = []
    for t in range(steps):
        rows = [problem._train.row(row) for _, row in problem._lower_sampler.batch(t, seed=0)]
        length = max(len(ids) for ids, _ in rows)
        ids = torch.full((len(rows), length), 258)
        labels = torch.full((len(rows), length), -100)
        mask = torch.zeros(len(rows), length, dtype=torch.int64)
        for place, (row_ids, row_labels) in enumerate(rows):
            tokens = torch.from_numpy(row_ids).long()
            ids[place, : len(tokens)] = tokens
            mask[place, : len(tokens)] = 1
            labels[place, : len(tokens)] = torch.where(torch.from_numpy(row_labels), tokens, -100)
        if problem.mean_over == "tokens":
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        else:
            logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
            each = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
            loss = (each.sum(1) / (labels[:, 1:] != -100).sum(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(float(loss.detach()))
    return model.state_dict(), losses


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2"])
@pytest.mark.parametrize("mean_over", ["rows", "tokens"])
def test_steps_are_those_of_a_plain_training_loop(tuning: Make, family: str, mean_over: str) -> None:
    """Float32; sums are taken in another order, so 1e-5 of the largest entry. AdamW's eps is large enough here that an entry
    whose gradient is rounding noise does not make a full step."""
    problem = tuning(family, mean_over=mean_over)
    for ours, theirs in (
        (SGD(clip=0.5), lambda p: torch.optim.SGD(p, lr=0.1)),
        (AdamW(eps=1e-3, clip=0.5), lambda p: torch.optim.AdamW(p, lr=0.1, eps=1e-3, weight_decay=0.0)),
    ):
        backend = Keeping(device="cpu", micro_batch_size=3)
        history = fit(problem, Descent(lr=0.1, optimizer=ours), backend, steps=2).history
        weights, losses = plain_loop(problem, theirs, steps=2, clip=0.5)
        assert [record.metrics["lower_loss"] for record in history] == pytest.approx(losses, rel=1e-5)
        tuned = backend.modules["z"].model.state_dict()  # type: ignore[attr-defined]
        for name, expected in weights.items():
            assert (tuned[name] - expected).abs().max() <= 1e-5 * expected.abs().max(), name


@pytest.mark.parametrize(("lora", "active"), [(None, LISA(blocks=1, period=3)), (LoRA(rank=2), None)])
def test_an_interrupted_run_ends_with_the_same_checkpoint(
    tuning: Make, tmp_path: Path, lora: LoRA | None, active: LISA | None
) -> None:
    """Bit for bit, in bfloat16, cut within a period of LISA and after a switch."""

    def go(where: str, steps: int, resume: bool = False) -> dict[str, bytes]:
        output = tmp_path / where
        train(tuning(lora=lora), output, steps=steps, active=active, resume=resume, dtype="bfloat16", micro_batch_size=4)
        last = output / "checkpoints" / f"step-{steps:08d}"
        timed = ("run.json", "manifest.json")  # they hash the lines of metrics.jsonl, which say how long a step took
        return {
            file.name: file.read_bytes() for file in (*last.iterdir(), output / "training.json") if file.name not in timed
        }

    whole = go("whole", 7)
    go("cut", 2)
    go("cut", 4, resume=True)
    assert go("cut", 7, resume=True) == whole


def test_a_run_of_another_recipe_is_not_resumed(tuning: Make, tmp_path: Path) -> None:
    train(tuning(), tmp_path / "run", steps=1)
    with pytest.raises(InputError, match=r"a different recipe: problem\.fields\.mean_over was 'rows' and is now 'tokens'"):
        train(tuning(mean_over="tokens"), tmp_path / "run", steps=2, resume=True)


def changed(problem: FineTuning, module: Any) -> set[str]:
    before = problem.lower().state_dict()
    return {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_lisa_trains_the_drawn_blocks_alone(tuning: Make, dtype: str | None) -> None:
    problem, active = tuning(), LISA(blocks=1, period=9, rest="train")
    module = train(problem, active=active, dtype=dtype)
    blocks = problem.blocks(problem.lower())  # of the placed one, only the active parameters require gradients
    expected = blocks.parameters(active.at(0, blocks, seed=0))
    if dtype is None:  # in bfloat16 the start differs from the files' float32
        assert changed(problem, module) == set(expected)
    frozen = {name: tensor for name, tensor in problem.lower().state_dict().items() if name not in expected}
    for name, tensor in frozen.items():
        assert torch.equal(module.state_dict()[name], tensor.to(module.state_dict()[name].dtype)), name


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "gpt-neox"])
def test_lora_trains_adapters_alone_and_starts_where_the_model_is(tuning: Make, family: str) -> None:
    problem = tuning(family, lora=LoRA(rank=2, alpha=8))
    ids, positions = torch.arange(20)[None], torch.tensor([3, 19])
    wrapped, bare = problem.lower(), tuning(family).lower()
    assert torch.equal(wrapped(ids, positions), bare(ids, positions))
    module = train(problem)
    moved = changed(problem, module)
    adapters = {name for name in module.state_dict() if "lora_" in name}
    assert {name for name in moved if "lora_B" not in name} <= adapters
    assert {name for name in adapters if "lora_B" in name} <= moved
    assert len(adapters) >= 2 * 3 * 4  # A and B of at least four layers in each of three blocks


def test_adapters_can_be_checkpointed_and_trained_in_bfloat16(tuning: Make) -> None:
    """Recomputing a block changes no bit; a float32 master is kept for adapters alone."""
    one, other = (
        train(tuning(lora=LoRA(rank=2)), dtype="bfloat16", activation_checkpointing=recompute) for recompute in (False, True)
    )
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    backend = Keeping(device="cpu", dtype="bfloat16")
    history = fit(tuning(lora=LoRA(rank=2)), Descent(), backend, steps=1).history
    parameters = sum(p.numel() for name, p in backend.modules["z"].named_parameters() if "lora_" in name)  # type: ignore[attr-defined]
    bound = 12 * parameters + 4 * 1000  # master and two moments, and a step count for each tensor
    assert 12 * parameters <= history[0].optimizer_bytes <= bound


def test_layers_that_no_target_names_are_said(tuning: Make) -> None:
    with pytest.raises(InputError, match=r"problem\.lora\.targets is \['nonsense'\]"):
        tuning(lora=LoRA(targets=["nonsense"])).lower()


def test_lora_without_peft_names_the_extra(tuning: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr(FineTuning, "lower", lambda self: pytest.fail("the model was loaded"))
    with pytest.raises(InputError, match=r"pip install 'bilevel\[llm\]'"):
        train(tuning(lora=LoRA()))


def trained_rows(problem: FineTuning, batches: int) -> set[tuple[int, ...]]:
    shard = Keeping(device="cpu").shard
    return {tuple(row.tolist()) for k in range(batches) for batch in problem.lower_batch(k, shard) for row in batch.ids}


def test_rows_that_are_held_out_are_never_trained_on(
    tuning: Make, data: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows of the validation set and of a test set, some with other case and spaces, one of them repeated."""
    validation, test, clean = sentences(4, 30), sentences(7, 20), sentences(1, 12)
    shouted = [{**row, "output": row["output"].upper() + "  "} for row in test[:2]]
    mixed = [*clean, *validation[:3], validation[0], *shouted]
    mix = write_rows(tmp_path / "mix.jsonl", [{**row, "_bilevel": {"source": "a", "row": 1}} for row in mixed])
    guarded = tuning(data=mix, held_out=[write_rows(tmp_path / "test.jsonl", test)])
    with caplog.at_level("WARNING", logger="bilevel"):
        guarded.prepare()
    assert (
        f"6 of 18 training rows also occur in the validation or held-out data ({mix}:13 = {data['target']}:1" in caplog.text
    )
    clean_alone = tuning(data=write_rows(tmp_path / "clean.jsonl", clean))
    batch_long = dict.fromkeys(range(3))  # three batches of 8 see all 12 rows twice
    unpadded = [{tuple(x for x in row if x) for row in trained_rows(p, len(batch_long))} for p in (guarded, clean_alone)]
    assert unpadded[0] == unpadded[1]
    assert len(unpadded[0]) == 12
    train(guarded, tmp_path / "run", steps=1)
    written = json.loads((tmp_path / "run" / "training.json").read_text())
    assert written["data"]["training"]["dropped_as_held_out"] == 6
    assert written["data"]["training"]["rows"] == 12


def test_held_out_rows_in_the_training_data_can_be_refused(tuning: Make, data: dict[str, str]) -> None:
    with pytest.raises(InputError, match=r"30 of 70 training rows also occur.*on_overlap=drop"):
        tuning(data=[data["clean"], data["target"]], on_overlap="error").prepare()
    with pytest.raises(InputError, match="nothing is left to train on"):
        tuning(data=data["target"]).prepare()


def test_repeated_rows_are_seen_as_often_as_they_stand_there(tuning: Make, tmp_path: Path) -> None:
    rows = sentences(1, 4)
    problem = tuning(data=write_rows(tmp_path / "mix.jsonl", rows + rows[:1] * 4), batch_size=8)
    (batch,) = problem.lower_batch(0, Keeping(device="cpu").shard)
    assert sorted(sum(torch.equal(a, b) for b in batch.ids) for a in batch.ids) == [1, 1, 1, 5, 5, 5, 5, 5]


def test_lengths_in_epochs_and_tokens(tuning: Make) -> None:
    """40 rows in batches of 8; the tokens of the batches are those that training reports."""
    problem = tuning()
    assert [problem.steps(epochs=e) for e in (0.01, 1, 1.01, 3)] == [1, 5, 6, 15]
    history = fit(problem, Descent(lr=0.0), Keeping(device="cpu"), steps=3, seed=4).history
    seen = sum(record.size for record in history)
    assert problem.steps(tokens=seen, seed=4) == 3
    assert problem.steps(tokens=seen + 1, seed=4) == 4


def test_validation_is_the_weighted_mean_over_sets(tuning: Make, data: dict[str, str]) -> None:
    sets = [ValidationSet(data["target"], "one", weight=3.0), ValidationSet(data["noise"], "two")]
    (record,) = fit(tuning(validation=sets), Descent(), Keeping(device="cpu"), steps=1).history
    parts = record.parts["upper_parts"]
    assert record.metrics["upper_loss"] == pytest.approx(0.75 * parts["one"] + 0.25 * parts["two"], rel=1e-6)
    assert parts["one"] != parts["two"]


def test_a_small_validation_set_is_evaluated_whole(tuning: Make, tmp_path: Path) -> None:
    few = write_rows(tmp_path / "few.jsonl", sentences(8, 3))
    problem = tuning(validation=[ValidationSet(few)])
    assert sum(len(batch.ids) for batch in problem.upper_batch(5, Keeping(device="cpu").shard)) == 3


def test_training_lowers_both_losses_and_the_report_says_so(tuning: Make) -> None:
    problem = tuning()
    backend = Keeping(device="cpu")
    history = fit(problem, Descent(lr=3e-3, evaluate_every=10), backend, steps=41).history
    validation = [record.metrics["upper_loss"] for record in history if "upper_loss" in record.metrics]
    assert validation[-1] < 0.8 * validation[0]
    report = str(problem.report(history))
    assert f"validation loss {validation[0]:.4f} before the first step, {validation[-1]:.4f} after 40 steps" in report
    assert isinstance(backend.modules["z"], LanguageModel)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 1}, "max_length must be at least 2"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"validation": [ValidationSet("x", weight=0.0)]}, "every weight must be positive"),
    ],
)
def test_settings_that_make_no_sense_are_refused_at_once(tuning: Make, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tuning(**settings)


@pytest.mark.parametrize("settings", [{"rank": 0}, {"alpha": 0.0}])
def test_adapters_need_a_rank_and_a_scale(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        LoRA(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "no/such-model"}, r"problem\.model: 'no/such-model' is neither"),
        ({"data": "no-such.jsonl"}, "no such file: no-such.jsonl"),
        ({"held_out": ["no-such.jsonl"]}, "no such file: no-such.jsonl"),
        ({"validation": [ValidationSet("no-such.jsonl")]}, "no such file: no-such.jsonl"),
        ({"batch_size": 41}, "has 40 usable rows, and a batch of 41 needs 41"),
        ({"max_length": 5}, r"no row has a token to learn within max_length=5"),
    ],
)
def test_what_can_be_checked_before_the_model_is_loaded_is(
    tuning: Make, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(FineTuning, "lower", lambda self: pytest.fail("the model was loaded"))
    with pytest.raises(InputError, match=message):
        train(tuning(**settings))


def test_checkpoints_hold_the_weights_that_were_trained(tuning: Make, tmp_path: Path) -> None:
    module = train(tuning(), tmp_path / "run", steps=2)
    saved = SavedVariable(tmp_path / "run" / "checkpoints" / "step-00000002", "z")
    for name, tensor in saved.weights():
        assert torch.equal(tensor, module.state_dict()[name])
    assert {name for name, _ in saved.weights()} == {name for name, _ in module.named_parameters()}
