"""A run's model as others load it: the same logits, the same tokens."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from bilevel import InputError, ScaleBiO, fit
from bilevel_llm.data.chat import encode
from bilevel_llm.data.rows import Row, Turn
from bilevel_llm.data.settings import Source, ValidationSet
from bilevel_llm.finetuning.problem import FineTuning
from bilevel_llm.model.export import export_model
from bilevel_llm.model.lora import LoRA
from bilevel_llm.reweighting.problem import LLMReweighting
from tests.bilevel_llm.tiny import CHATML, Keeping, make_tokenizer, train

Make = Callable[..., FineTuning]
IDS = torch.arange(40).view(2, 20)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS).logits
    return found


def loaded(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory).eval()


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma2", "gpt2", "gpt-neox"])
def test_the_exported_model_gives_the_same_logits(tuning: Make, tmp_path: Path, family: str, dtype: str | None) -> None:
    module = train(tuning(family), tmp_path / "run", dtype=dtype)
    export_model(tmp_path / "run", tmp_path / "model")
    model = loaded(tmp_path / "model")
    module.model.set_attn_implementation(model.config._attn_implementation)  # training has one of its own
    assert torch.equal(logits(model), logits(module.model))
    assert model.dtype == (torch.bfloat16 if dtype else torch.float32)
    assert not torch.equal(logits(model), logits(loaded(Path(tuning(family).model)).to(model.dtype)))  # it was tuned
    assert [path.name for path in tmp_path.glob(".*")] == []  # nothing half-written is left
    assert len({file.stat().st_mode for file in (tmp_path / "model").iterdir()}) == 1  # who may read one may read all


def test_tied_weights_stay_tied_and_are_written_once(tuning: Make, tmp_path: Path) -> None:
    train(tuning("llama-tied"), tmp_path / "run")
    export_model(tmp_path / "run", tmp_path / "model")
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    model = loaded(tmp_path / "model")
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_precision_can_be_chosen(tuning: Make, tmp_path: Path, dtype: str) -> None:
    module = train(tuning(), tmp_path / "run")
    export_model(tmp_path / "run", tmp_path / "model", dtype=dtype)
    model = loaded(tmp_path / "model")
    assert model.dtype == getattr(torch, dtype)
    for name, tensor in module.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor.to(model.dtype)), name


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2"])
def test_adapters_are_merged(tuning: Make, tmp_path: Path, family: str) -> None:
    """W x + B A x against (W + B A) x, in float32: 1e-5 of the largest logit."""
    module = train(tuning(family, lora=LoRA(rank=2)), tmp_path / "run", lr=0.05)
    export_model(tmp_path / "run", tmp_path / "model")
    model, expected = loaded(tmp_path / "model"), logits(module.model)
    assert type(model) is type(loaded(Path(tuning(family).model)))
    assert not any("lora" in name for name in model.state_dict())
    assert (logits(model) - expected).abs().max() <= 1e-5 * expected.abs().max()
    untuned = logits(loaded(Path(tuning(family).model)))
    assert (untuned - expected).abs().max() > 1e-2 * expected.abs().max()


def test_an_adapter_of_a_bfloat16_run_is_merged_in_float32(tuning: Make, tmp_path: Path) -> None:
    """W + alpha/rank · B A."""
    module = train(tuning(lora=LoRA(rank=2, alpha=6)), tmp_path / "run", lr=0.05, dtype="bfloat16")
    export_model(tmp_path / "run", tmp_path / "model", dtype="float32")
    layer = module.float().model.base_model.model.model.layers[1].mlp.up_proj
    expected = layer.base_layer.weight + 3 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    merged = loaded(tmp_path / "model").model.layers[1].mlp.up_proj.weight
    torch.testing.assert_close(merged, expected, rtol=1e-6, atol=1e-7)
    export_model(tmp_path / "run", tmp_path / "as-it-was")
    assert loaded(tmp_path / "as-it-was").dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # within peft
def test_an_adapter_can_be_kept_apart(tuning: Make, tmp_path: Path) -> None:
    module = train(tuning(lora=LoRA(rank=2)), tmp_path / "run", lr=0.05)
    export_model(tmp_path / "run", tmp_path / "adapter", adapter=True)
    base = loaded(Path(tuning().model))
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "adapter").eval()), logits(module.model))
    assert torch.equal(logits(loaded(tmp_path / "adapter")), logits(module.model))  # transformers finds the base itself
    assert {path.name for path in (tmp_path / "adapter").glob("*.safetensors")} == {"adapter_model.safetensors"}


CONVERSATION = [
    ("system", "be brief"),
    ("user", "a cat?\n"),
    ("assistant", "the cat sat"),
    ("user", "and"),
    ("assistant", "ran"),
]


@pytest.mark.parametrize(
    ("own", "template", "adds_bos"),
    [(CHATML, "auto", False), (None, "auto", False), (CHATML, "plain", False), (None, "plain", True)],
)
def test_the_exported_chat_template_writes_what_was_trained_on(
    tuning: Make, model_directory: Callable[[str], Path], tmp_path: Path, own: str | None, template: Any, adds_bos: bool
) -> None:
    shutil.copytree(model_directory("llama"), tmp_path / "base")
    tokenizer = make_tokenizer(own)
    if adds_bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 256)])
    (tmp_path / "base" / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(tmp_path / "base")
    train(tuning(model=str(tmp_path / "base"), template=template), tmp_path / "run", steps=1)
    export_model(tmp_path / "run", tmp_path / "model")
    exported = AutoTokenizer.from_pretrained(tmp_path / "model")
    messages = [{"role": role, "content": text} for role, text in CONVERSATION]
    row = Row(tuple(Turn(role, text) for role, text in CONVERSATION), "x:1")
    trained = encode(row, AutoTokenizer.from_pretrained(tmp_path / "base"), template=template)
    assert exported.apply_chat_template(messages, return_dict=False) == trained.ids
    assert (trained.ids[0] == 256) == adds_bos
    prompt = exported.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    assert trained.ids[: len(prompt)] == prompt  # what is generated goes on where training had its labels
    assert trained.labels[len(prompt)]
    assert not trained.labels[len(prompt) - 1]
    assert (tmp_path / "model" / "generation_config.json").exists()


def test_either_variable_of_a_reweighting_run_and_any_checkpoint(
    model_directory: Callable[[str], Path], data: dict[str, str], tmp_path: Path
) -> None:
    problem = LLMReweighting(
        model=str(model_directory("llama")),
        sources=[Source("clean", data["clean"]), Source("noise", data["noise"])],
        validation=[ValidationSet(data["target"])],
        max_length=64,
        batch_size=8,
    )
    backend = Keeping(device="cpu")
    solver = ScaleBiO(penalty=1.0, lr_z=1e-2, warmup=1)
    fit(problem, solver, backend, steps=4, output=tmp_path / "run", checkpoint_every=2)
    for variable in (None, "z", "y"):
        export_model(tmp_path / "run", tmp_path / str(variable), variable=variable)
    z = logits(backend.modules["z"].model)  # type: ignore[attr-defined]
    assert torch.equal(logits(loaded(tmp_path / "None")), z)
    assert torch.equal(logits(loaded(tmp_path / "z")), z)
    assert not torch.equal(logits(loaded(tmp_path / "y")), z)
    export_model(tmp_path / "run", tmp_path / "early", step=2)
    assert not torch.equal(logits(loaded(tmp_path / "early")), z)
    with pytest.raises(InputError, match="no lower variable 'w'; there are: y, z"):
        export_model(tmp_path / "run", tmp_path / "w", variable="w")
    with pytest.raises(InputError, match="no checkpoint after 3 steps; there are: 2, 4"):
        export_model(tmp_path / "run", tmp_path / "w", step=3)


def test_nothing_is_written_over_and_nothing_half_written_is_left(
    tuning: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tuning(), tmp_path / "run", steps=1)
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError, match="mine already exists and is not overwritten"):
        export_model(tmp_path / "run", tmp_path / "mine")
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_model(tmp_path / "run", tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "run"]


def test_what_cannot_be_exported_is_said(tuning: Make, tmp_path: Path, model_directory: Callable[[str], Path]) -> None:
    with pytest.raises(InputError, match=r"is not a run: there is no recipe\.yaml"):
        export_model(tmp_path, tmp_path / "new")
    train(tuning(), tmp_path / "run", steps=1)
    with pytest.raises(InputError, match="has not trained an adapter.*without --adapter"):
        export_model(tmp_path / "run", tmp_path / "new", adapter=True)
    with pytest.raises(InputError, match=r"--dtype float8: a model is written in float32, bfloat16, float16"):
        export_model(tmp_path / "run", tmp_path / "new", dtype="float8")
    recipe = tmp_path / "run" / "recipe.yaml"
    right = recipe.read_text()
    recipe.write_text(right.replace(str(model_directory("llama")), str(model_directory("gpt2"))))
    with pytest.raises(InputError, match="is of a different model from the recipe's"):
        export_model(tmp_path / "run", tmp_path / "new")
    recipe.write_text("problem: {name: quadratic, m: 2}\n")
    with pytest.raises(InputError, match="a run of 'quadratic', which has no language model"):
        export_model(tmp_path / "run", tmp_path / "new")
    recipe.write_text(right)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(InputError, match="has no checkpoint yet"):
        export_model(tmp_path / "run", tmp_path / "new")
    assert not (tmp_path / "new").exists()
