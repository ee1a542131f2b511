"""What reweighting and fine-tuning have in common: data that is recognized again, names of sets, and a model whose weights may
stay in their files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bilevel import All, Descent, InputError, Problem, fit
from bilevel.planning.footprint import Footprint
from bilevel.planning.hardware import Hardware
from bilevel.planning.load import Setup
from bilevel.planning.plan import Plan, make_plan
from bilevel.problem import deferred_initialization
from bilevel_backends.deferred_init import materialize
from bilevel_backends.torch_backend import TorchBackend
from bilevel_llm.baselines.less import LESS
from bilevel_llm.baselines.swarm import Swarm
from bilevel_llm.data.settings import ValidationSet
from bilevel_llm.finetuning.problem import FineTuning
from bilevel_llm.model.files import ModelFiles
from bilevel_llm.model.lora import LoRA
from bilevel_llm.problem import LanguageModelProblem
from tests.bilevel_llm.tiny import FAMILIES, Keeping, sentences, train, write_rows

Make = Callable[..., LanguageModelProblem]

RENAMED = "gpt-neox"
"""A family whose files call the output layer otherwise than the model does."""


@pytest.fixture(params=["problem", "tuning"])
def either(request: pytest.FixtureRequest) -> Make:
    """Makes a problem of the one kind, then of the other."""
    make: Make = request.getfixturevalue(request.param)
    return make


# -------------------------------------------------------------------------------------------------------------- fingerprint


def test_the_fingerprint_is_that_of_the_data_and_the_model(either: Make, data: dict[str, str]) -> None:
    assert either().fingerprint() == either().fingerprint()
    assert either().fingerprint() != either("qwen2").fingerprint()
    assert either().fingerprint() != either(validation=[ValidationSet(data["noise"])]).fingerprint()


def test_fine_tuning_is_not_resumed_on_other_data_under_the_same_name(
    tuning: Callable[..., FineTuning], tmp_path: Path
) -> None:
    mix = tmp_path / "mix.jsonl"
    write_rows(mix, sentences(1, 40))
    train(tuning(data=str(mix)), tmp_path / "run", steps=1)
    write_rows(mix, sentences(2, 40))
    with pytest.raises(InputError, match="made with different data or a different model"):
        train(tuning(data=str(mix)), tmp_path / "run", steps=2, resume=True)


def test_fine_tuning_is_not_resumed_when_other_rows_are_held_out(tuning: Callable[..., FineTuning], tmp_path: Path) -> None:
    """The files to train on are the same, the rows are not."""
    test = tmp_path / "test.jsonl"
    write_rows(test, sentences(9, 3))
    train(tuning(held_out=[str(test)]), tmp_path / "run", steps=1)
    write_rows(test, sentences(1, 40)[:3])  # these stand in the training data
    with pytest.raises(InputError, match="made with different data or a different model"):
        train(tuning(held_out=[str(test)]), tmp_path / "run", steps=2, resume=True)


def test_fine_tuning_is_not_resumed_from_another_model_in_the_same_place(
    tuning: Callable[..., FineTuning], model_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    place = tmp_path / "model"
    place.symlink_to(model_directory("llama"))
    train(tuning(model=str(place)), tmp_path / "run", steps=1)
    place.unlink()
    place.symlink_to(model_directory("qwen2"))
    with pytest.raises(InputError, match="made with different data or a different model"):
        train(tuning(model=str(place)), tmp_path / "run", steps=2, resume=True)


@pytest.mark.parametrize("change", ["template", "template file", "vocabulary"])
def test_a_run_is_not_resumed_when_the_same_text_becomes_other_tokens(
    change: str, tuning: Callable[..., FineTuning], model_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    place = tmp_path / "model"
    shutil.copytree(model_directory("llama"), place)
    train(tuning(model=str(place)), tmp_path / "run", steps=1)
    if change == "template":
        settings = json.loads((place / "tokenizer_config.json").read_text())
        settings["chat_template"] = "{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}"
        (place / "chat_template.jinja").unlink(missing_ok=True)
        (place / "tokenizer_config.json").write_text(json.dumps(settings))
    elif change == "template file":
        template = place / "chat_template.jinja"
        template.write_text("{{ bos_token }}" + template.read_text())
    else:
        tokenizer = json.loads((place / "tokenizer.json").read_text())
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        (place / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match="made with different data or a different model"):
        train(tuning(model=str(place)), tmp_path / "run", steps=2, resume=True)


# ---------------------------------------------------------------------------------------------------- several validation sets


def test_sets_of_the_same_name_are_all_evaluated(either: Make, data: dict[str, str]) -> None:
    files = (data["target"], data["noise"], data["other"])
    sets = [ValidationSet(file, name) for file, name in zip(files, ("v-3", "v", "v"), strict=True)]
    (record,) = fit(either(validation=sets), Descent(), TorchBackend(device="cpu"), steps=1).history
    assert list(record.parts["upper_parts"]) == ["v-3", "v", "v-2"]
    assert len(set(record.parts["upper_parts"].values())) == 3


# ------------------------------------------------------------------------------------------------ weights that stay in files


def deferred(problem: LanguageModelProblem, seed: int = 0) -> nn.Module:
    """The lower module as a backend for several processes builds it."""
    torch.manual_seed(seed)
    with deferred_initialization():
        return problem.lower()


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)])
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {RENAMED}))
def test_weights_that_are_read_one_by_one_are_those_of_the_whole_model(
    tuning: Callable[..., FineTuning], monkeypatch: pytest.MonkeyPatch, family: str, lora: LoRA | None
) -> None:
    """Bit for bit; of adapters, too, which stand in no file and start at random."""
    problem = tuning(family, lora=lora)
    torch.manual_seed(0)
    whole = problem.lower()
    monkeypatch.setattr(ModelFiles, "load_model", lambda *a: pytest.fail("the model was loaded whole"))
    module = deferred(problem)
    held = {name for name, parameter in module.named_parameters() if not parameter.is_meta}
    assert held == {name for name, _ in module.named_parameters() if "lora_" in name}
    trained = {name for name, parameter in whole.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in module.named_parameters() if parameter.requires_grad} == trained
    materialize(module, dict(module.named_parameters()), lambda name, _: module.stored_weight(name))
    found = module.state_dict()
    assert found.keys() == whole.state_dict().keys()
    for name, expected in whole.state_dict().items():
        assert torch.equal(found[name], expected), name
        assert found[name].dtype == expected.dtype, name
    ids, positions = torch.arange(20)[None], torch.tensor([3, 19])
    assert torch.equal(module(ids, positions), whole(ids, positions))


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)])
def test_a_model_whose_files_name_their_weights_otherwise_is_loaded_whole(
    tuning: Callable[..., FineTuning], lora: LoRA | None
) -> None:
    module = deferred(tuning(RENAMED, lora=lora))
    assert not any(parameter.is_meta for parameter in module.parameters())


# --------------------------------------------------------------------------------------------------------------------- plans


def plan(problem: LanguageModelProblem, **settings: Any) -> Plan:
    backend = TorchBackend(dtype="bfloat16", **settings)
    model = Footprint(problem.cost(0.5), backend.dtype)
    return make_plan(model, Setup(backend, All(), Descent().workload()), Hardware())


@pytest.fixture
def config_only(model_directory: Callable[[str], Path], tmp_path: Path) -> Callable[[str], str]:
    """Family -> a directory with a model's config.json and nothing else."""

    def directory(family: str) -> str:
        place = tmp_path / family
        place.mkdir(exist_ok=True)
        (place / "config.json").write_text((model_directory(family) / "config.json").read_text())
        return str(place)

    return directory


@pytest.mark.parametrize("mean_over", ["rows", "tokens"])
@pytest.mark.parametrize("lora", [None, LoRA(rank=2)])
def test_fine_tuning_is_planned_without_weights_and_data(
    tuning: Callable[..., FineTuning], config_only: Callable[[str], str], lora: LoRA | None, mean_over: str
) -> None:
    problem = tuning(model=config_only("llama"), data="not/there.jsonl", lora=lora, mean_over=mean_over)
    found = plan(problem)
    parameters = {name: p.numel() for name, p in tuning(lora=lora).lower().named_parameters()}
    assert found.parameters == sum(parameters.values())
    adapters = sum(size for name, size in parameters.items() if "lora_" in name)
    assert found.active == (adapters if lora else found.parameters)
    assert found.gpu["moments"] == 8 * found.active
    assert found.gpu["activations"] > 0
    assert found.unit == "tokens"
    evaluated = 8 / 50  # batches a step
    assert found.units == pytest.approx(problem.batch_size * problem.max_length * (1 + evaluated))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_adapters_of_every_family_can_be_planned(
    tuning: Callable[..., FineTuning], config_only: Callable[[str], str], family: str
) -> None:
    found = plan(tuning(model=config_only(family), lora=LoRA(rank=2)), activation_checkpointing=True)
    assert 0 < found.active < found.parameters


@pytest.mark.parametrize(("sets", "rows"), [(0, 0), (1, 8), (3, 6), (9, 9)])
def test_planned_validation_batches_are_the_largest_there_can_be(
    tuning: Callable[..., FineTuning], data: dict[str, str], sets: int, rows: int
) -> None:
    problem = tuning(validation=[ValidationSet(data["target"])] * sets)
    assert problem.cost().upper_rows == rows
    batches = problem.upper_batch(0, Keeping(device="cpu").shard)
    assert sum(len(batch.ids) for batch in batches) == rows


def test_whatever_trains_on_tokens_counts_tokens() -> None:
    """Runs of fine-tuning and reweighting, and those inside of baselines."""
    assert all((LESS, Swarm)), "their modules are loaded"
    kinds, waiting = [], [Problem]
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        if kind.__module__.startswith("bilevel_llm.") and kind is not LanguageModelProblem:
            kinds.append(kind)
    assert {"FineTuning", "LLMReweighting", "SwarmRuns", "_WarmUp"} <= {kind.__name__ for kind in kinds}
    assert {kind.labels.unit for kind in kinds} == {"tokens"}
