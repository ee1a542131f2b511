"""What the deepspeed and fsdp backends refuse before any process meets another."""

import json
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from bilevel import SGD, InputError
from bilevel.blocks import Blocks
from bilevel.errors import RunError
from bilevel_backends.deepspeed_backend import DeepSpeedBackend
from bilevel_backends.fsdp_backend import FSDPBackend
from bilevel_backends.processes import Processes, join_processes
from bilevel_backends.torch_backend import TorchBackend

LAYERS = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
MODULE = (LAYERS, Blocks({"0": ("0.weight", "0.bias"), "1": ("1.weight", "1.bias")}, ("0", "1")))
"""Two blocks of twelve parameters."""


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


@pytest.mark.parametrize(
    ("local_rank", "stated"),
    [("3", {}), ("0", {"LOCAL_WORLD_SIZE": "4"}), ("0", {"LOCAL_SIZE": "4"})],
    ids=["by the process without one", "by the first, under torchrun", "by the first, under deepspeed"],
)
def test_more_processes_than_gpus_are_refused(
    local_rank: str, stated: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first process, too, has to know: it is the one that speaks."""
    for name, value in {"LOCAL_RANK": local_rank, **stated}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match=r"process 2 of this machine has no GPU: 4 were started.*--nproc-per-node 2"):
        FSDPBackend().start(seed=0)


def test_gpus_of_different_kinds_are_named_when_the_processes_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = ["H100 with 80 GiB", "H100 with 80 GiB", "A100 with 40 GiB"]
    for name, value in {"is_initialized": True, "get_rank": 1, "get_world_size": 3}.items():
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    monkeypatch.setattr(Processes, "all_gather_object", lambda self, kind: kinds if kind == "cpu" else None)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InputError, match="process 0 has H100 with 80 GiB, and process 2 has A100 with 40 GiB"):
        join_processes(torch.device("cpu"), 60.0)


@pytest.fixture
def first_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is the first of two, the other of which never comes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", **address}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("first_of_two")
def test_a_process_that_never_comes_is_not_waited_for() -> None:
    started = time.monotonic()
    with pytest.raises(RunError, match=r"the 2 processes do not meet: .*whether every machine reaches 127\.0\.0\.1, port"):
        join_processes(torch.device("cpu"), timeout=0.5)
    assert time.monotonic() - started < 10


@pytest.mark.usefixtures("first_of_two")
def test_if_the_first_process_does_not_come_the_next_one_speaks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("bilevel_backends.processes.TURN", 0.0)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(RunError):
        join_processes(torch.device("cpu"), timeout=0.1)
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "the 2 processes do not meet" in caplog.text


@pytest.mark.usefixtures("first_of_two")
def test_a_network_that_does_not_come_up_is_not_waited_for_however_long_a_run_may_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """NCCL may hang without an end."""
    monkeypatch.setattr("bilevel_backends.processes.MEETING", 0.05)
    hangs, started = threading.Event(), time.monotonic()
    with pytest.raises(RunError, match=r"they have waited for 0\.05 s.*NCCL_SOCKET_IFNAME"):
        join_processes(torch.device("cpu"), timeout=1800, init=lambda *_, **__: hangs.wait(30))
    hangs.set()
    assert time.monotonic() - started < 10


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
        ({"data_efficiency": {"enabled": True}}, "config: data_efficiency cannot be set here: it is not known"),
        ({"zero_optimization": {"zenflow": {}}}, r"config: zero_optimization\.zenflow cannot be set here: it is not known"),
        ({"zero_optimization": []}, "config: zero_optimization must be a mapping"),
        (
            {"zero_optimization": {"overlap_comm": "yes"}},
            r"zero_optimization\.overlap_comm must be true or false, not 'yes'",
        ),
        ({"zero_optimization": {"sub_group_size": -1}}, r"zero_optimization\.sub_group_size must be a whole number"),
        ({"zero_optimization": {"reduce_bucket_size": float("nan")}}, r"reduce_bucket_size must be a whole number"),
    ],
)
def test_a_deepspeed_configuration_that_changes_the_result_is_refused(config: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DeepSpeedBackend(config=config)


def test_what_a_deepspeed_configuration_leaves_open_is_decided_here() -> None:
    """The configuration that transformers documents for stage 3."""
    config = {
        "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
        "bf16": {"enabled": False},
        "optimizer": {"type": "auto", "params": {"lr": "auto"}},
        "zero_optimization": {
            "stage": "auto", "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9,
            "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto", "stage3_max_live_parameters": 1e9,
        },
        "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "train_batch_size": "auto", "steps_per_print": 5,
    }  # fmt: skip
    told = DeepSpeedBackend(config=config)._config(*MODULE)
    assert "auto" not in json.dumps(told)
    assert told["zero_optimization"] == {
        "stage": 3, "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9,
        "stage3_max_live_parameters": 1e9, "stage3_prefetch_bucket_size": 12,
    }  # fmt: skip
    assert told["gradient_clipping"] == 0.0
    assert told["steps_per_print"] == 5
    assert "fp16" not in told


@pytest.mark.parametrize(
    ("device", "expected", "objects"), [("cpu", "gloo", None), ("cuda", "cpu:gloo,cuda:nccl", "a group of gloo")]
)
def test_what_is_offloaded_to_the_cpu_has_a_group_that_can_reduce_it(
    device: str, expected: str, objects: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    for name, value in {"is_initialized": False, "get_rank": 0, "get_world_size": 1}.items():
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    monkeypatch.setattr(torch.distributed, "new_group", lambda backend, timeout: f"a group of {backend}")
    monkeypatch.setattr("bilevel_backends.processes._connect", lambda device: None)
    monkeypatch.setattr("bilevel_backends.processes._kind", lambda device: device.type)
    processes = join_processes(torch.device(device), 60.0, lambda backend, timeout: asked.append(backend))
    assert asked == [expected]
    assert processes.objects == objects, "objects would be sent from the GPU, which all processes would wait for"


def test_a_deepspeed_configuration_may_be_a_file(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage3_prefetch_bucket_size": 1000}, "steps_per_print": 5}))
    told = DeepSpeedBackend(config=str(file), offload_parameters=True)._config(*MODULE)
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
        ({"config": {"steps_per_print": 5}, "zero_stage": 2}, "used in zero_stage 3 alone, not in 2"),
        ({"timeout": 0}, "timeout must be positive"),
        ({"micro_batch_size": 0}, "micro_batch_size must be at least 1"),
        ({"shard_group": 0}, "shard_group must be at least 1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DeepSpeedBackend(**settings)  # type: ignore[arg-type]
