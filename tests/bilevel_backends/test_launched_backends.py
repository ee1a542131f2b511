"""What the deepspeed and fsdp backends refuse before any process meets another."""

import json
import sys
from pathlib import Path

import pytest
import torch

from bilevel import SGD, InputError
from bilevel_backends.deepspeed_backend import DeepSpeedBackend
from bilevel_backends.fsdp_backend import FSDPBackend
from bilevel_backends.torch_backend import TorchBackend


def test_without_deepspeed_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(InputError, match=r"pip install 'bilevel\[deepspeed\]'"):
        DeepSpeedBackend().start(seed=0)


@pytest.mark.parametrize("backend", [FSDPBackend()])
def test_without_a_launcher_the_command_is_named(backend: FSDPBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(InputError, match="torchrun --nproc-per-node 8 -m bilevel run"):
        backend.start(seed=0)


def test_the_torch_backend_refuses_to_run_eight_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(InputError, match=r"one process, and a launcher started 8; set backend\.name=deepspeed"):
        TorchBackend().start(seed=0)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="process 3 of this machine has no GPU: there are 2"):
        FSDPBackend().start(seed=0)


@pytest.mark.parametrize("backend", [FSDPBackend(), DeepSpeedBackend(zero_stage=3)])
def test_a_backend_that_splits_parameters_gives_no_whole_module(backend: FSDPBackend | DeepSpeedBackend) -> None:
    variable = TorchBackend(device="cpu").place("y", lambda: torch.nn.Linear(1, 1), SGD(), sharded=False)
    with pytest.raises(InputError, match=f"the backend {backend.placement(1).name} splits the parameters of variable 'y'"):
        backend.whole_module(variable)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"optimizer": {"type": "Adam"}}, "config: optimizer cannot be set here: .*solver.optimizer_z"),
        ({"gradient_clipping": 1.0}, r"config: gradient_clipping .*solver.optimizer_z\.clip"),
        ({"fp16": {"enabled": True}}, "config: fp16 .*backend.dtype=bfloat16"),
        ({"train_batch_size": 8}, r"config: train_batch_size .*problem\.batch_size"),
        ({"zero_optimization": {"stage": 1}}, r"config: zero_optimization\.stage .*backend\.zero_stage"),
        ({"zero_optimization": {"zero_quantized_weights": True}}, "zero_quantized_weights .*rounded"),
    ],
)
def test_a_deepspeed_configuration_that_changes_the_result_is_refused(config: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DeepSpeedBackend(config=config)


def test_a_deepspeed_configuration_may_be_a_file(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage3_prefetch_bucket_size": 1000}, "steps_per_print": 5}))
    told = DeepSpeedBackend(config=str(file), offload_parameters=True)._config()
    assert told["zero_optimization"]["stage3_prefetch_bucket_size"] == 1000
    assert told["zero_optimization"]["stage"] == 3
    assert told["zero_optimization"]["offload_param"]["device"] == "cpu"
    assert told["steps_per_print"] == 5
    assert told["gradient_clipping"] == 0.0
    file.write_text("{")
    with pytest.raises(ValueError, match=r"ds\.json cannot be read"):
        DeepSpeedBackend(config=str(file))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"offload_parameters": True, "zero_stage": 2}, "offload_parameters needs zero_stage 3"),
        ({"timeout": 0}, "timeout must be positive"),
        ({"micro_batch_size": 0}, "micro_batch_size must be at least 1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DeepSpeedBackend(**settings)  # type: ignore[arg-type]
