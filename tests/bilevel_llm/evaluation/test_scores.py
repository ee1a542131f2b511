import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from bilevel import InputError
from bilevel.terminal import Terminal
from bilevel_llm.data.settings import DataFiles, ValidationSet
from bilevel_llm.data.tokens import tokenize
from bilevel_llm.evaluation.scores import Scores, evaluate, score, show
from bilevel_llm.finetuning.problem import FineTuning
from bilevel_llm.model.files import find_model
from tests.bilevel_llm.tiny import sentences, write_rows


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_scores_are_what_a_row_by_row_reference_computes(
    model_directory: Callable[[str], Path], data: dict[str, str], family: str
) -> None:
    """The whole model, one row at a time without padding; 1e-5 in float32."""
    directory = str(model_directory(family))
    (scores,) = evaluate(directory, [data["target"]], max_length=60).values()
    table = tokenize(DataFiles([data["target"]]), find_model(directory).load_tokenizer(), max_length=60)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    losses, correct, targets = [], [], []
    for i in range(len(table)):
        ids, labels = (torch.from_numpy(part.copy()) for part in table.row(i))
        with torch.no_grad():
            predicted = model(input_ids=ids[None].long()).logits[0, :-1]
        each = F.cross_entropy(predicted, ids[1:].long(), reduction="none")[labels[1:]]
        losses.append(float(each.sum()))
        targets.append(len(each))
        correct.append(int((predicted.argmax(-1) == ids[1:])[labels[1:]].sum()))
    assert scores.targets.tolist() == targets
    assert scores.correct.tolist() == correct
    np.testing.assert_allclose(scores.losses, losses, rtol=1e-5)
    summary = scores.summary()
    assert summary["rows"] == 30
    assert summary["tokens"] == sum(targets)
    assert summary["loss"] == pytest.approx(sum(losses) / sum(targets), rel=1e-5)
    assert summary["row_loss"] == pytest.approx(sum(a / b for a, b in zip(losses, targets, strict=True)) / 30, rel=1e-5)
    assert summary["perplexity"] == pytest.approx(math.exp(summary["loss"]))
    assert summary["row_perplexity"] == pytest.approx(math.exp(summary["row_loss"]))
    assert summary["token_accuracy"] == sum(correct) / sum(targets)


def test_the_batches_change_nothing_and_the_same_call_gives_the_same_numbers(tuning: Callable[..., FineTuning]) -> None:
    problem = tuning()
    module, table = problem.lower(), problem._train
    padded: list[int] = []
    module.register_forward_pre_hook(lambda _, inputs: padded.append(inputs[0].numel()))
    by_budget = {budget: score(module, table, tokens_per_batch=budget) for budget in (1, 150, 300, 10_000)}
    for scores in by_budget.values():
        np.testing.assert_allclose(scores.losses, by_budget[1].losses, rtol=1e-5)
    assert np.array_equal(score(module, table, tokens_per_batch=300).losses, by_budget[300].losses)
    tokens = int(table.lengths.sum())
    assert sum(padded[: len(table)]) == tokens  # a row at a time: no padding at all
    padded.clear()
    score(module, table, tokens_per_batch=300)
    assert max(padded) <= 300
    assert sum(padded) <= 1.1 * tokens


def test_files_are_scored_one_by_one(model_directory: Callable[[str], Path], tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b")):
        write_rows(tmp_path / f"{name}.jsonl", sentences(seed, 5 + seed))
    scores = evaluate(str(model_directory("llama")), [f"{tmp_path}/*.jsonl"], max_length=64)
    assert {Path(path).name: len(one.targets) for path, one in scores.items()} == {"a.jsonl": 5, "b.jsonl": 6}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": ["no-such.jsonl"]}, "no such file"),
        ({"max_length": 3}, "no row has a token to learn"),
        ({"template": "fancy"}, "fancy"),
        ({"device": "quantum"}, "--device quantum: this machine cannot use it"),
    ],
)
def test_what_cannot_be_used_is_said_before_the_model_is_loaded(
    model_directory: Callable[[str], Path],
    data: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    settings: Any,
    message: str,
) -> None:
    monkeypatch.setattr("bilevel_llm.model.files.ModelFiles.load_model", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(InputError, match=message):
        evaluate(str(model_directory("llama")), **{"data": [data["target"]], "max_length": 64, **settings})


def test_every_set_is_read_in_its_own_format(model_directory: Callable[[str], Path], tmp_path: Path) -> None:
    rows = [{**row, "text": "ab"} for row in sentences(1, 3)]
    file = write_rows(tmp_path / "a.jsonl", rows)
    model = str(model_directory("llama"))
    (as_text,) = evaluate(model, [ValidationSet(file, format="text")], max_length=64).values()
    assert as_text.targets.tolist() == [2, 2, 2]  # b, and the end of the sequence
    (named,) = evaluate(model, [file], format="text", max_length=64).values()
    assert named.targets.tolist() == [2, 2, 2]
    (detected,) = evaluate(model, [file], max_length=64).values()
    assert detected.targets.tolist() != [2, 2, 2]


def test_columns_are_named_for_files_and_a_sample_is_scored_as_one_set(
    model_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    model = str(model_directory("llama"))
    rows = sentences(4, 12)
    write_rows(tmp_path / "known.jsonl", rows)
    asked = write_rows(tmp_path / "asked.jsonl", [{"q": row["instruction"], "a": row["output"]} for row in rows])
    fields = {"prompt": "q", "response": "a"}
    (known,) = evaluate(model, [str(tmp_path / "known.jsonl")], max_length=64).values()
    (named,) = evaluate(model, [asked], fields=fields, max_length=64).values()
    assert named.losses.tolist() == known.losses.tolist()
    files = [asked, str(tmp_path / "asked2.jsonl")]
    write_rows(tmp_path / "asked2.jsonl", [{"q": f"{i}", "a": "b"} for i in range(5)])
    (sample,) = evaluate(model, [DataFiles(files, fields=fields, max_rows=6)], max_length=64).values()
    assert len(sample.targets) == 6
    with pytest.raises(InputError, match="fields: 'promt' is no role"):
        evaluate(model, [asked], fields={"promt": "q"})


@pytest.mark.parametrize("width", [40, 80, 200])
def test_paths_are_shown_whole_however_narrow_the_terminal_is(width: int) -> None:
    path = "/data/" + "a long directory/" * 12 + "rows.jsonl"
    shown = io.StringIO()
    one = Scores(np.array([2]), np.array([1.0]), np.array([1]))
    show({path: one, "short.jsonl": one}, Terminal(file=shown, width=width))
    assert shown.getvalue().splitlines()[-2:] == [f"file 1: {path}", "file 2: short.jsonl"]
