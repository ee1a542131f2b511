"""A base in 4 bits below adapters. bitsandbytes has kernels for CPUs, too, which these tests use."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from bilevel import AdamW, All, Backend, InputError, ScaleBiO, fit
from bilevel.blocks import find_blocks
from bilevel.planning.footprint import Footprint
from bilevel.planning.hardware import Hardware
from bilevel.planning.load import Setup
from bilevel.planning.plan import make_plan
from bilevel_backends.deepspeed_backend import DeepSpeedBackend
from bilevel_backends.fsdp_backend import FSDPBackend
from bilevel_backends.torch_backend import TorchBackend
from bilevel_llm.model.export import export_model
from bilevel_llm.model.lora import LoRA
from bilevel_llm.reweighting.problem import LLMReweighting
from tests.bilevel_backends.distributed.cases import tensors
from tests.bilevel_llm.tiny import SIZES, make_tokenizer

NF4 = LoRA(rank=2, quantize="nf4")


@pytest.fixture
def small(problem: Callable[..., LLMReweighting], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., LLMReweighting]:
    """A model whose matrices fill whole groups of 64 weights."""
    where = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    sizes = {**SIZES, "hidden_size": 128, "intermediate_size": 256}
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).save_pretrained(where)
    make_tokenizer().save_pretrained(where)
    return lambda **settings: problem(model=str(where), max_length=48, batch_size=3, **settings)


def scales(parameter: Any) -> int:
    """The bytes beside a packed parameter's own."""
    state = parameter.quant_state
    return int(state.absmax.nbytes + state.state2.absmax.nbytes)


def test_replicas_share_the_packed_base_which_computes_nearly_what_the_dense_one_does(small: Any) -> None:
    backend = TorchBackend(device="cpu")
    backend.start(seed=0)
    z = backend.place("z", small(lora=NF4).lower, AdamW(), sharded=True, blocks=find_blocks)
    y = backend.replicate(z, "y")
    packed = [name for name, parameter in z.module.named_parameters() if parameter.dtype == torch.uint8]
    assert len(packed) == 3 * 7
    for name in packed:
        one, other = z.parameter(name), y.parameter(name)
        assert one is other
        assert y.module.get_submodule(name.removesuffix(".weight")).quant_state is one.quant_state  # type: ignore[attr-defined]
    ids, places = torch.arange(30)[None], torch.arange(30)
    with torch.no_grad():
        exact, found = small().lower()(ids, places), y(ids, places)
    assert torch.equal(found, z(ids, places))
    error = float((found - exact).std() / exact.std())
    assert 1e-4 < error < 0.2  # the rounding error of a weight is about a tenth of its spread
    backend.close()


def test_the_plan_knows_the_bytes_of_a_packed_base(small: Any) -> None:
    planned = Footprint(small(lora=NF4).cost(), "float32")
    module = small(lora=NF4).lower().float()
    held = sum(p.nbytes + (scales(p) if p.dtype == torch.uint8 else 0) for p in module.parameters())
    assert planned.bytes == pytest.approx(held, rel=0.02)
    assert planned.unpacked_bytes == 4 * 128 * 256
    for backend in (FSDPBackend(), DeepSpeedBackend(zero_stage=3)):
        with pytest.raises(InputError, match="splits parameters, which works with numbers only, and the base is quantized"):
            make_plan(planned, Setup(backend, All(), ScaleBiO().workload()), Hardware())


def test_a_run_on_a_packed_base_resumes_bit_for_bit(small: Any, tmp_path: Path) -> None:
    for name, ends in (("straight", [2]), ("resumed", [1, 2])):
        for steps in ends:
            fit(
                small(lora=NF4),
                ScaleBiO(lr_x=0.1, lr_z=1e-2, warmup=0),
                TorchBackend(device="cpu"),
                steps=steps,
                output=tmp_path / name,
                resume=steps == 2 and len(ends) == 2,
            )
    straight, resumed = (tensors(tmp_path / name, 2) for name in ("straight", "resumed"))
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in straight.items())


def test_its_adapters_are_merged_into_the_full_weights_with_a_word(
    small: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(small(lora=NF4), ScaleBiO(warmup=0), TorchBackend(device="cpu"), steps=1, output=tmp_path / "run")
    with caplog.at_level(logging.WARNING):
        export_model(tmp_path / "run", tmp_path / "model")
    assert "the base was quantized in training, and is written in full precision here" in caplog.text
    written: dict[str, Tensor] = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    base = small().lower().model.state_dict()
    assert torch.equal(written["lm_head.weight"], base["lm_head.weight"])
    assert (written["model.layers.0.mlp.up_proj.weight"] - base["model.layers.0.mlp.up_proj.weight"]).abs().max() < 0.01


def test_without_bitsandbytes_it_is_refused_before_any_data_is_read(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr(LLMReweighting, "_tokenize", lambda *a: pytest.fail("the data were read"))
    with pytest.raises(InputError, match=r"needs the package bitsandbytes .*pip install 'bilevel\[quantized\]'"):
        small(lora=NF4).prepare()


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
        self.adapter = nn.Parameter(torch.zeros(4))


@pytest.mark.parametrize("backend", [FSDPBackend(), DeepSpeedBackend(zero_stage=3)])
def test_a_backend_that_splits_parameters_refuses_packed_ones_by_name(backend: Backend) -> None:
    with pytest.raises(InputError, match="base is quantized, and .* splits parameters"):
        backend.shard_module(Packed(), find_blocks(Packed()), None)  # type: ignore[attr-defined]


def test_a_base_that_was_quantized_on_another_device_is_refused() -> None:
    backend = TorchBackend(dtype="float32")
    backend.begin(0, torch.device("meta"), backend._grid)
    with pytest.raises(InputError, match=r"base is quantized on cpu, and the backend's device is meta; set backend\.device"):
        backend.shard_module(Packed(), find_blocks(Packed()), None)
