"""A parameter without a dimension is kept, saved and loaded like any other, however it is sharded."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bilevel import SGD, AdamW, InputError
from bilevel.blocks import Blocks
from bilevel_backends.fsdp_backend import FSDPBackend
from bilevel_backends.module_backend import ModuleBackend
from bilevel_backends.processes import Grid
from bilevel_backends.sharding.partitioned import Partitioned
from bilevel_backends.sharding.strategy import ShardingStrategy
from bilevel_backends.torch_backend import TorchBackend
from bilevel_backends.variable import ModuleVariable


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.shift = nn.Parameter(torch.ones(3))

    def forward(self) -> Tensor:
        return (self.scale * self.shift).square().sum()


@dataclass
class Flat(TorchBackend):
    """Holds flat shards, as a process of ZeRO stage 1 does, although there is no other process."""

    def shard_module(self, module: nn.Module, blocks: Blocks, like: ModuleVariable | None) -> ShardingStrategy:
        return Partitioned(module, Grid.alone(), torch.device("cpu"), reduces_at_step=True)


def trained(backend: ModuleBackend, steps: int, loaded: Path | None = None) -> ModuleVariable:
    backend.start(seed=0)
    variable = backend.place("y", Scaled, AdamW(), sharded=True)
    backend.activate(variable, variable.blocks.names)
    if loaded is not None:
        backend.load(loaded, [variable])
    for _ in range(steps):
        backend.backward(lambda batch: variable(), [None], wrt={variable: 1.0})
        backend.step(variable, lr=0.1)
    return variable


@pytest.mark.parametrize(("first", "second"), [(TorchBackend, Flat), (Flat, TorchBackend), (Flat, Flat)])
def test_a_run_goes_on_with_the_moments_of_a_scalar(
    first: type[TorchBackend], second: type[TorchBackend], tmp_path: Path
) -> None:
    reference = TorchBackend(device="cpu")
    expected = reference.weights(trained(reference, 5))
    backend = first(device="cpu")
    backend.save(tmp_path, [trained(backend, 3)], copy=False)()
    again = second(device="cpu")
    variable = trained(again, 2, tmp_path)
    assert variable.optimizer is not None
    for master, state in variable.optimizer.state.items():
        assert state["exp_avg"].shape == master.shape
    for name, tensor in again.weights(variable).items():
        assert torch.equal(tensor, expected[name])


def test_fsdp_refuses_a_scalar_by_its_name() -> None:
    with pytest.raises(InputError, match=r"the parameter 'scale' is a scalar, .* give it the shape \(1,\)"):
        FSDPBackend().place("y", Scaled, SGD(), sharded=True)
