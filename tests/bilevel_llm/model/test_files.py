"""Every way of loading gives the same model, and what files and config.json disagree about is refused by name."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from bilevel import InputError
from bilevel_backends.deferred_init import materialize
from bilevel_llm.model.files import ModelFiles, find_model

Tensors = dict[str, Tensor]
UP, HEAD, EMBEDDING = "model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def edited(model_directory: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A family's model, with other tensors or other values in config.json (None takes one away)."""

    def edit(
        family: str, change: Callable[[Tensors], object] | None = None, config: Mapping[str, Any] | None = None
    ) -> Path:
        place = tmp_path / "edited"
        shutil.copytree(model_directory(family), place)
        if change is not None:
            tensors = load_file(place / "model.safetensors")
            change(tensors)
            save_file(tensors, place / "model.safetensors", {"format": "pt"})
        settings = {**json.loads((place / "config.json").read_text()), **(config or {})}
        (place / "config.json").write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
        return place

    return edit


# ----------------------------------------------------------------------------------------------------------------- identity


@pytest.mark.parametrize(
    ("name", "belongs"),
    [
        ("model.safetensors", True), ("model-00001-of-00002.safetensors", True), ("config.json", True),
        ("modeling_own.py", True), ("tokenizer.json", True), ("tokenizer.model", True), ("chat_template.jinja", True),
        ("additional_chat_templates/tools.jinja", True), ("README.md", False), ("generation_config.json", False),
    ],
)  # fmt: skip
def test_the_hash_of_a_model_is_that_of_every_byte_that_makes_it(name: str, belongs: bool, tmp_path: Path) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    content = bytearray(3 << 20)
    file.write_bytes(content)
    before = ModelFiles(tmp_path).fingerprint
    content[len(content) // 2] = 1  # in the middle, as a block that was tuned
    file.write_bytes(content)
    assert (ModelFiles(tmp_path).fingerprint != before) == belongs


# ------------------------------------------------------------------------------------------------------------------ loading


def read(place: Path, way: str) -> Any:
    """The model, loaded whole, or part by part as the backends do that split it."""
    files = find_model(str(place))
    if way == "whole":
        return files.load_model()
    model, stored = files.load_skeleton()
    if stored is not None:
        materialize(model, dict(model.named_parameters()), lambda name, _: stored(name))
    return model


BROKEN: dict[str, tuple[str, Callable[[Tensors], object] | None, dict[str, Any], str]] = {
    "a lost tensor": ("llama", lambda t: t.pop(UP), {}, f"lack {UP}, which the model of config.json has"),
    "a lost tensor, renamed": ("gpt-neox", lambda t: t.pop("embed_out.weight"), {}, "lack lm_head.weight"),
    "no output layer": ("llama", lambda t: t.pop(HEAD), {}, f"lack {HEAD}"),
    "tied files": ("llama-tied", None, {"tie_word_embeddings": False}, f"lack {HEAD}"),
    "tied config": ("llama", None, {"tie_word_embeddings": True}, f"{EMBEDDING} and {HEAD} are tied .* different values"),
    "tied config, renamed": ("gpt-neox", None, {"tie_word_embeddings": True}, "tie_word_embeddings"),
    "one tensor more": ("qwen2", lambda t: t.update(extra=torch.zeros(3)), {}, "hold extra, for which .* no place"),
    "fewer layers": ("mistral", None, {"num_hidden_layers": 2}, "hold model.layers.2.input_layernorm.weight .and 8 more"),
    "more layers": ("gemma2", None, {"num_hidden_layers": 4, "layer_types": None}, "lack model.layers.3.input_layernorm"),
    "another vocabulary": ("llama", None, {"vocab_size": 300}, r"has the shape \(264, 32\) in the files and \(300, 32\)"),
    "another shape": ("gpt2", lambda t: t.update({"transformer.ln_f.bias": torch.zeros(7)}), {}, r"ln_f.bias has the shape \(7,\)"),
    "quantized": ("llama", lambda t: t.update({UP: t[UP].to(torch.int8)}), {}, f"quantized: {UP} is stored as I8"),
}  # fmt: skip


@pytest.mark.parametrize("way", ["whole", "in parts"])
@pytest.mark.parametrize("case", BROKEN)
def test_what_files_and_config_disagree_about_is_named(case: str, way: str, edited: Callable[..., Path]) -> None:
    family, change, config, words = BROKEN[case]
    with pytest.raises(InputError, match=words):
        read(edited(family, change, config), way)


def halved(names: Callable[[str], bool]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: t.bfloat16() for name, t in tensors.items() if names(name)})


WHOLE_AND_SOUND: dict[str, tuple[str, Callable[[Tensors], object] | None, dict[str, Any], torch.dtype]] = {
    "files of several precisions": ("llama", halved(lambda name: "mlp" in name), {}, torch.float32),
    "a config in another precision": ("qwen2", None, {"dtype": "bfloat16"}, torch.bfloat16),
    "a config without precision": ("llama", halved(lambda name: True), {"dtype": None}, torch.bfloat16),
    "tied weights, stored twice": ("llama-tied", lambda t: t.update({HEAD: t[EMBEDDING].clone()}), {}, torch.float32),
    "tied weights, stored as the output": ("llama-tied", lambda t: t.update({HEAD: t.pop(EMBEDDING)}), {}, torch.float32),
}


@pytest.mark.parametrize("case", WHOLE_AND_SOUND)
def test_every_way_of_loading_gives_the_same_bits(case: str, edited: Callable[..., Path]) -> None:
    family, change, config, precision = WHOLE_AND_SOUND[case]
    place = edited(family, change, config)
    whole, parts = read(place, "whole").state_dict(), read(place, "in parts").state_dict()
    assert parts.keys() == whole.keys()
    for name, tensor in whole.items():
        assert tensor.dtype == parts[name].dtype == precision, name
        assert torch.equal(parts[name], tensor), name
    stored = load_file(place / "model.safetensors")
    assert all(torch.equal(whole[name], tensor.to(precision)) for name, tensor in stored.items())


@pytest.mark.parametrize("way", ["whole", "in parts"])
def test_of_several_copies_of_the_weights_the_one_of_transformers_is_read(way: str, edited: Callable[..., Path]) -> None:
    place = edited("llama")
    stored = load_file(place / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in stored.items()}, place / "zz-consolidated.safetensors")
    assert torch.equal(read(place, way).state_dict()[UP], stored[UP])


@pytest.mark.parametrize("way", ["whole", "in parts"])
def test_a_file_of_weights_that_is_missing_or_damaged_is_named(
    way: str, model_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    AutoModelForCausalLM.from_pretrained(model_directory("llama")).save_pretrained(tmp_path, max_shard_size="60KB")
    part = sorted(tmp_path.glob("model-*"))[1]
    content = part.read_bytes()
    part.write_bytes(content[:100])
    with pytest.raises(InputError, match=rf"{part.name} cannot be read: .*copy the file anew"):
        read(tmp_path, way)
    part.unlink()
    with pytest.raises(InputError, match=f"is incomplete: its file {part.name} is missing"):
        read(tmp_path, way)
    save_file({"other": torch.zeros(1)}, part, {"format": "pt"})
    with pytest.raises(InputError, match=rf"{part.name} lacks .*, which model.safetensors.index.json says is there"):
        read(tmp_path, way)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../elsewhere.safetensors"}}')
    with pytest.raises(
        InputError, match=r"model.safetensors.index.json cannot be read: weight_map must name a file beside it"
    ):
        read(tmp_path, way)
    (tmp_path / "model.safetensors.index.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"model.safetensors.index.json cannot be read: "):
        read(tmp_path, way)


def test_pickled_weights_and_adapters_are_not_taken_for_the_model(edited: Callable[..., Path]) -> None:
    place = edited("llama")
    (place / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="holds an adapter beside the model"):
        find_model(str(place))
    (place / "adapter_config.json").unlink()
    torch.save(load_file(place / "model.safetensors"), place / "pytorch_model.bin")
    (place / "model.safetensors").unlink()
    with pytest.raises(InputError, match="pickled weights are not read"):
        find_model(str(place))


def write_gguf(file: Path, model: Any, *, without: str = "", rope: str = "") -> None:
    """The model as GGUF, in llama.cpp's names, with a tokenizer of single bytes."""
    c = model.config
    writer = GGUFWriter(file, "llama")
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(c.vocab_size)
    if rope:
        writer.add_string("llama.rope.scaling.type", rope)
        writer.add_float32("llama.rope.scaling.factor", 4.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["t", "1", "2", "t1", *(f"t{i}" for i in range(2, c.vocab_size - 2))])
    writer.add_token_merges(["t 1", "t 2"])  # one alone would be read as a string by older versions of transformers
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    renamed = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers.": "blk.",
        "self_attn.o_proj": "attn_output", "self_attn.": "attn_", "mlp.": "ffn_", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm", "_proj": "",
    }  # fmt: skip
    for name, tensor in model.state_dict().items():
        new = name
        for old, there in renamed.items():
            new = new.replace(old, there)
        if new != without:
            writer.add_tensor(new, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"without": "blk.1.ffn_up.weight"}, "lack model.layers.1.mlp.up_proj.weight"),
        ({"rope": "yarn"}, r"scales its rotary positions \(yarn\)"),
    ],
)
def test_a_gguf_file_that_is_not_read_as_it_is_meant_is_refused(
    settings: dict[str, str],
    words: str,
    model_directory: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BILEVEL_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "tiny.gguf"
    write_gguf(file, ModelFiles(model_directory("llama")).load_model(), **settings)
    with pytest.raises(InputError, match=words):
        find_model(str(file))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
