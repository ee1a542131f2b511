"""Parameters that never train: replicas share them, and checkpoints know them by their checksums."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bilevel import AdamW, InputError
from bilevel.blocks import find_blocks
from bilevel.checkpoint import SavedVariable
from bilevel.checksum import checksum
from bilevel_backends.torch_backend import TorchBackend
from bilevel_backends.variable import ModuleVariable

FIXED = {"layers.0.weight", "layers.1.weight"}


class Net(nn.Module):
    """Of four layers, the first two never train; the last one shares its weight with the third."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(4))
        self.layers[3].weight = self.layers[2].weight
        self.layers[:2].requires_grad_(False)

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        return hidden


@pytest.fixture(params=["float32", "bfloat16"])
def backend(request: pytest.FixtureRequest) -> Iterator[TorchBackend]:
    started = TorchBackend(device="cpu", dtype=request.param)
    started.start(seed=0)
    yield started
    started.close()


def pair(backend: TorchBackend) -> tuple[ModuleVariable, ModuleVariable]:
    z = backend.place("z", Net, AdamW(), sharded=True, blocks=find_blocks)
    y = backend.replicate(z, "y")
    for variable in (y, z):
        backend.activate(variable, z.blocks.names)
    return y, z


def step(backend: TorchBackend, variable: ModuleVariable) -> None:
    rows = torch.ones(2, 6, dtype=variable.parameter("layers.2.weight").dtype)
    backend.backward(lambda b: variable(b).float().square().sum(), [rows], wrt={variable: 1.0})
    backend.step(variable, lr=0.1)


def save(backend: TorchBackend, where: Path, *variables: ModuleVariable) -> Path:
    where.mkdir()
    backend.save(where, variables, copy=False)()
    return where


def test_replicas_hold_them_once_and_train_apart(backend: TorchBackend) -> None:
    y, z = pair(backend)
    before = z.module.state_dict()["layers.2.weight"].clone()
    step(backend, y)
    assert {name for name in y.sharding.parameters if y.parameter(name) is z.parameter(name)} == FIXED
    assert torch.equal(z.module.state_dict()["layers.2.weight"], before)
    assert not torch.equal(y.module.state_dict()["layers.2.weight"], before)
    backend.assign(z, y)
    assert all(torch.equal(tensor, z.module.state_dict()[name]) for name, tensor in y.module.state_dict().items())


def test_checkpoints_hold_what_trains_and_load_bit_for_bit(backend: TorchBackend, tmp_path: Path) -> None:
    y, z = pair(backend)
    step(backend, y)
    where = save(backend, tmp_path / "saved", y, z)
    assert {name for name, _ in SavedVariable(where, "y").weights()} == {"layers.2.weight"}
    assert backend.checkpoint_bytes([y]) == 36 * (y.parameter("layers.2.weight").element_size() + 3 * 4)
    kept = backend.weights(y)
    step(backend, y)
    backend.load(where, [y, z])
    assert all(torch.equal(tensor, kept[name]) for name, tensor in backend.weights(y).items())


def test_a_checkpoint_above_other_ones_is_refused_by_name(backend: TorchBackend, tmp_path: Path) -> None:
    y, z = pair(backend)
    where = save(backend, tmp_path / "saved", y, z)
    other = TorchBackend(device="cpu", dtype=backend.dtype)
    other.start(seed=0)
    y, z = pair(other)
    weight = y.parameter("layers.1.weight").data
    weight[0, 0], weight[0, 1] = weight[0, 1].clone(), weight[0, 0].clone()
    with pytest.raises(InputError, match=r"made above other weights: y/layers\.1\.weight, which does not train"):
        other.load(where, [y, z])
    other.close()


def test_checkpoints_that_hold_them_as_earlier_versions_wrote_them_still_load(backend: TorchBackend, tmp_path: Path) -> None:
    y, z = pair(backend)
    y.fixed.names = z.fixed.names = frozenset()  # as if everything had to be saved
    kept = backend.weights(y)
    where = save(backend, tmp_path / "saved", y, z)
    index = where / "variables.json"
    facts = json.loads(index.read_text())
    for of_variable in facts.values():
        assert of_variable.pop("fixed") == {}
    index.write_text(json.dumps(facts))
    with torch.no_grad():
        for tensor in y.sharding.parameters.values():
            tensor.zero_()
    y.fixed.names = z.fixed.names = frozenset(FIXED)
    backend.load(where, [y, z])
    assert all(torch.equal(tensor, kept[name]) for name, tensor in backend.weights(y).items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.uint8])
def test_checksums_add_up_from_parts_and_see_exchanged_numbers(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.arange(23).to(dtype)
    whole = checksum(values)
    assert checksum(values[:9]) + checksum(values[9:], 9) == whole
    assert checksum(values.roll(1)) != whole
    monkeypatch.setattr("bilevel.checksum.CHUNK", 4)
    assert checksum(values) == whole
    exchanged = values.clone()
    exchanged[2], exchanged[3] = values[3], values[2]
    assert re.fullmatch(r"-?\d+", str(int(whole)))
    assert checksum(exchanged) != whole
