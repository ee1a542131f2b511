"""Language models under ZeRO and FSDP: weights read part by part, tied embeddings, frozen embeddings, recomputed blocks."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bilevel_backends.torch_backend import TorchBackend
from tests.bilevel_backends.distributed.cases import tensors
from tests.bilevel_backends.distributed.language import TUNINGS, WHOLE, reweight, tune
from tests.bilevel_backends.distributed.worker import KINDS
from tests.bilevel_llm.conftest import data, model_directory  # noqa: F401 (fixtures)

Work = Callable[..., Path]


@pytest.fixture(scope="session")
def settings(model_directory: Callable[[str], Path], data: dict[str, str]) -> dict[str, dict[str, object]]:  # noqa: F811
    return {
        family: {"model": str(model_directory(family)), "data": data}
        for family in ("llama-tied", "qwen2", "gemma2", "gpt2", "bert")
    }


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *itertools.product(["llama-tied", "qwen2", "gemma2", "gpt2"], ["zero2", "zero3", "fsdp"]),
        *itertools.product(WHOLE, ["zero0", "zero1"]),
    ],
)
def test_two_processes_learn_from_packed_rows_what_one_does_from_padded_ones(
    family: str,
    kind: str,
    settings: dict[str, dict[str, object]],
    work: Work,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bilevel_llm.problem.can_be_packed", lambda found: False)
    found = work("language_models", lambda where: write(where, settings)) / f"{family}-{kind}"
    reweight(TorchBackend(dtype="float32", device="cpu"), settings[family], tmp_path / "run")
    agree(found, tmp_path / "run")
    last = [json.loads((where / "metrics.jsonl").read_text().splitlines()[-1]) for where in (tmp_path / "run", found)]
    assert last[1]["size"] == last[0]["size"], "throughput counts the tokens of all processes"


@pytest.mark.parametrize("kind", ["zero2", "zero3", "fsdp"])
def test_a_model_that_sees_its_targets_is_refused_by_every_process(
    kind: str, settings: dict[str, dict[str, object]], work: Work
) -> None:
    where = work("language_models", lambda where: write(where, settings))
    said = [(where / f"bert-{kind}-{rank}.txt").read_text() for rank in (0, 1)]
    assert all("the model is not causal" in words for words in said)
    assert not (where / f"bert-{kind}").exists()


@pytest.mark.parametrize("kind", ["zero2", "zero3", "fsdp"])
@pytest.mark.parametrize("tuning", TUNINGS)
def test_two_processes_tune_as_one_does_without_loading_the_model_whole(
    tuning: str, kind: str, settings: dict[str, dict[str, object]], work: Work, tmp_path: Path
) -> None:
    found = work("fine_tuning", lambda where: write(where, settings["llama-tied"])) / f"{tuning}-{kind}"
    tune(TorchBackend(dtype="float32", device="cpu"), settings["llama-tied"], TUNINGS[tuning], tmp_path / "run")
    agree(found, tmp_path / "run")


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_reweight_adapters_on_one_base_as_one_process_does(
    kind: str, settings: dict[str, dict[str, object]], work: Work, tmp_path: Path
) -> None:
    where = work("fine_tuning", lambda where: write(where, settings["llama-tied"]))
    reweight(TorchBackend(dtype="float32", device="cpu"), settings["llama-tied"], tmp_path / "run", TUNINGS["lora"])
    agree(where / f"reweighting-{kind}", tmp_path / "run")
    for rank in (0, 1):
        held = json.loads((where / f"sharing-{kind}-{rank}.json").read_text())
        assert {name for name, once in held.items() if once} == {name for name in held if "lora_" not in name}


def write(where: Path, settings: object) -> None:
    (where / "settings.json").write_text(json.dumps(settings))


def agree(found: Path, expected: Path) -> None:
    """All tensors of the checkpoints of step 4 are the same."""
    actual, wanted = tensors(found, 4), tensors(expected, 4)
    assert actual.keys() == wanted.keys()
    for name, tensor in wanted.items():
        # float32 rounding in another order, through AdamW, after 4 steps of 1e-3
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=2e-5)
