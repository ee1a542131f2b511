import copy
import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bilevel import SGD, AdamW, Forward, InputError, NonFiniteError, find_blocks
from bilevel.data import generator
from bilevel_backends.backward import run_backward
from bilevel_backends.module_backend import to_device
from bilevel_backends.rounding import round_stochastically
from bilevel_backends.torch_backend import TorchBackend
from bilevel_backends.variable import ModuleVariable


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, h: Tensor) -> Tensor:
        return h + torch.tanh(self.inner(h))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(4))
        self.out = nn.Linear(8, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        h = inputs.to(self.out.weight.dtype)
        for layer in self.layers:
            h = layer(h)
        return self.out(h).squeeze(1)


@dataclass(frozen=True)
class Rows:
    inputs: Tensor
    targets: Tensor
    total: int
    size: int


def rows(n: int = 12, micro: int = 12, seed: int = 0) -> list[Rows]:
    g = torch.Generator().manual_seed(seed)
    inputs, targets = torch.randn(n, 8, generator=g), torch.randn(n, generator=g)
    return [Rows(inputs[i : i + micro], targets[i : i + micro], n, len(inputs[i : i + micro])) for i in range(0, n, micro)]


def loss(y: Forward, batch: Rows) -> Tensor:
    return ((y(batch.inputs).float() - batch.targets) ** 2).sum() / batch.total


@pytest.fixture
def backend():  # type: ignore[no-untyped-def]
    started = TorchBackend(device="cpu")
    started.start(seed=0)
    yield started
    started.close()


def place(backend: TorchBackend, optimizer: SGD | AdamW | None = None, name: str = "y") -> ModuleVariable:

    return backend.place(name, Net, optimizer or AdamW(), sharded=True, blocks=find_blocks)


def some(*indices: int) -> frozenset[str]:
    return frozenset(f"layers.{i}" for i in indices)


def snapshot(variable: ModuleVariable) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in variable.module.state_dict().items()}


def changed(variable: ModuleVariable, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in variable.module.state_dict().items() if not torch.equal(tensor, before[name])}


def train(backend: TorchBackend, variable: ModuleVariable, steps: int = 3, lr: float = 1e-2) -> None:
    for step in range(steps):
        backend.backward(lambda b: loss(variable, b), rows(seed=step), wrt={variable: 1.0})
        backend.step(variable, lr=lr)


@pytest.mark.parametrize(("ours", "theirs"), [
    (AdamW(betas=(0.8, 0.95), weight_decay=0.1), lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.8, 0.95), weight_decay=0.1)),
    (SGD(momentum=0.9, weight_decay=0.1), lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1)),
    (SGD(clip=0.05), lambda p: torch.optim.SGD(p, lr=0.01)),
])  # fmt: skip
def test_training_equals_a_plain_torch_loop(backend: TorchBackend, ours, theirs) -> None:  # type: ignore[no-untyped-def]
    """Same kernels but for fused updates and a gradient buffer: float32 rounding, 1e-6 relative over 5 steps."""
    variable = place(backend, ours)
    reference = copy.deepcopy(variable.module).requires_grad_(True)
    backend.activate(variable, variable.blocks.names)
    optimizer = theirs(reference.parameters())
    for step in range(5):
        backend.backward(lambda b: loss(variable, b), rows(micro=5, seed=step), wrt={variable: 1.0})
        backend.step(variable, lr=0.01)
        optimizer.zero_grad()
        loss(reference, rows(seed=step)[0]).backward()
        if ours.clip:
            torch.nn.utils.clip_grad_norm_(reference.parameters(), ours.clip)
        optimizer.step()
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(variable.module.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)


def test_gradients_carry_the_weight_they_are_asked_with_and_go_nowhere_else(backend: TorchBackend) -> None:
    y, z = place(backend), place(backend, name="z")
    x = backend.place("x", lambda: nn.Linear(1, 1, bias=False), SGD(), sharded=False)
    for variable in (y, z):
        backend.activate(variable, variable.blocks.names)

    def joint(b: Rows) -> Tensor:
        return (x(torch.ones(1, 1)) * loss(y, b)).sum() + loss(z, b)

    backend.backward(joint, rows(), wrt={y: 1.0, x: 1.0})
    plain = {name: gradient.clone() for name, gradient in y.gradients.items()}
    plain_x = x.gradients["weight"].clone()
    backend.backward(joint, rows(), wrt={y: -0.25, x: 3.0})
    assert not z.gradients
    assert all(parameter.grad is None for variable in (x, y, z) for parameter in variable.module.parameters())
    torch.testing.assert_close(x.gradients["weight"], plain_x * 4.0)
    for name, gradient in y.gradients.items():
        torch.testing.assert_close(gradient, plain[name] * 0.75)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_frozen_blocks_stay_bit_identical_and_only_active_ones_move(dtype) -> None:  # type: ignore[no-untyped-def]
    backend = TorchBackend(device="cpu", dtype=dtype)
    backend.start(seed=0)
    variable = place(backend)
    for draw in (some(1, 2), some(2, 3), some(0)):
        before = snapshot(variable)
        backend.activate(variable, draw)
        assert not changed(variable, before)  # switching alone changes nothing
        train(backend, variable)
        assert changed(variable, before) == set(variable.blocks.parameters(draw))
    backend.close()


@pytest.mark.parametrize(("dtype", "a_parameter"), [("float32", 8), ("bfloat16", 12)])
def test_optimizer_state_is_that_of_the_active_blocks_alone(dtype, a_parameter: int) -> None:  # type: ignore[no-untyped-def]
    """Two float32 moments of each active parameter, and in bfloat16 its master; 4 bytes a tensor for the step count."""
    backend = TorchBackend(device="cpu", dtype=dtype)
    backend.start(seed=0)
    variable = place(backend)
    held = []
    for draw in (some(0, 1), some(2, 3), some(1, 2), some(3)):
        backend.activate(variable, draw)
        train(backend, variable)
        parameters = [variable.parameter(name) for name in variable.blocks.parameters(draw)]
        held.append(backend.optimizer_bytes(variable))
        assert held[-1] == sum(a_parameter * p.numel() + 4 for p in parameters)
    assert held[0] == held[1] == held[2] == 2 * held[3]
    backend.close()


def test_the_state_of_adam_is_that_of_a_plain_torch_loop_and_a_copy(backend: TorchBackend) -> None:
    variable = place(backend)
    reference = copy.deepcopy(variable.module).requires_grad_(True)
    backend.activate(variable, some(1))
    assert backend.optimizer_state(variable) == {name: {} for name in variable.blocks.parameters(some(1))}
    optimizer = torch.optim.AdamW(reference.layers[1].parameters(), lr=0.01, weight_decay=0)
    for step in range(3):
        backend.backward(lambda b: loss(variable, b), rows(seed=step), wrt={variable: 1.0})
        backend.step(variable, lr=0.01)
        optimizer.zero_grad()
        loss(reference, rows(seed=step)[0]).backward()
        optimizer.step()
    found = backend.optimizer_state(variable)
    assert list(found) == variable.blocks.parameters(some(1))
    for name, state in found.items():
        for key in ("exp_avg", "exp_avg_sq", "step"):
            torch.testing.assert_close(state[key], optimizer.state[reference.get_parameter(name)][key])
            state[key].zero_()  # of the copy
    assert all(state["step"] == 3 for state in backend.optimizer_state(variable).values())


def test_the_module_of_a_variable_is_whole_on_one_device(backend: TorchBackend) -> None:
    variable = place(backend)
    module = backend.whole_module(variable)
    torch.testing.assert_close(module(torch.ones(2, 8)), variable(torch.ones(2, 8)))
    assert {name for name, _ in module.named_parameters()} == set(variable.blocks.parameters(variable.blocks.names))


def test_nothing_piles_up_over_many_switches(backend: TorchBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bilevel_backends.variable.SMALL", 0)  # hooks are for large variables
    variable = place(backend)
    for switch in range(50):
        backend.activate(variable, some(switch % 4, (switch + 1) % 4))
        train(backend, variable, steps=1)
    hooks = [len(p._post_accumulate_grad_hooks or {}) for p in variable.module.parameters()]
    assert max(hooks) == 1
    assert sum(hooks) == 4
    assert variable.optimizer is not None
    assert len(variable.optimizer.state) == 4


def test_a_block_that_stays_keeps_its_moments_and_one_that_comes_back_starts_afresh(backend: TorchBackend) -> None:
    variable = place(backend)
    backend.activate(variable, some(0, 1))
    train(backend, variable, steps=3)

    def count(index: int) -> float:
        assert variable.optimizer is not None
        state = variable.optimizer.state.get(variable.masters[f"layers.{index}.inner.weight"], {})
        return float(state.get("step", 0))

    backend.activate(variable, some(1, 2))
    assert (count(1), count(2)) == (3, 0)
    backend.activate(variable, some(0, 1))
    assert (count(0), count(1)) == (0, 3)


def test_blocks_with_and_without_momentum_step_together(backend: TorchBackend) -> None:
    """A fresh block's momentum starts at zero beside a kept one: equal to two optimizers, one for each block."""
    variable = place(backend, SGD(momentum=0.9))
    reference = copy.deepcopy(variable.module).requires_grad_(True)
    backend.activate(variable, some(1))
    train(backend, variable, steps=2, lr=0.1)
    backend.activate(variable, some(1, 2))
    train(backend, variable, steps=2, lr=0.1)
    kept, fresh = (torch.optim.SGD(reference.layers[i].parameters(), lr=0.1, momentum=0.9) for i in (1, 2))
    for phase in ([kept], [kept, fresh]):
        for step in range(2):
            reference.zero_grad()
            loss(reference, rows(seed=step)[0]).backward()
            for optimizer in phase:
                optimizer.step()
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(variable.module.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)


def test_activation_checkpointing_changes_no_number() -> None:
    gradients = {}
    for recompute in (False, True):
        backend = TorchBackend(device="cpu", activation_checkpointing=recompute)
        backend.start(seed=0)
        y = place(backend)
        z = backend.replicate(y, "z")
        backend.activate(z, some(1, 3))
        calls: list[int] = []
        z.module.layers[1].inner.register_forward_pre_hook(lambda module, inputs: calls.append(1))
        backend.backward(lambda b: loss(z, b), rows(), wrt={z: 1.0})
        assert len(calls) == (2 if recompute else 1)
        gradients[recompute] = z.gradients
        backend.close()
    for name, gradient in gradients[False].items():
        assert torch.equal(gradient, gradients[True][name])


def test_a_replica_has_the_same_weights_and_shares_nothing(backend: TorchBackend) -> None:
    y = place(backend)
    z = backend.replicate(y, "z")
    before = snapshot(y)
    assert not changed(z, before)
    backend.activate(z, some(0))
    train(backend, z)
    assert changed(z, before)
    assert not changed(y, before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_assigning_copies_all_that_decides_the_future(dtype) -> None:  # type: ignore[no-untyped-def]
    backend = TorchBackend(device="cpu", dtype=dtype)
    backend.start(seed=0)
    z = place(backend)
    y = backend.replicate(z, "y")
    for variable in (y, z):
        backend.activate(variable, some(0, 2))
    train(backend, z)
    backend.assign(y, z)
    assert not changed(y, snapshot(z))
    for variable in (y, z):
        train(backend, variable)
    assert not changed(y, snapshot(z))
    backend.activate(y, some(1))
    with pytest.raises(InputError, match="different active blocks"):
        backend.assign(y, z)
    backend.close()


def test_small_steps_are_not_lost_in_bfloat16() -> None:
    """200 steps of 1e-6 on weights whose bfloat16 spacing is 1e-3: rounding to nearest would give up all of the drift."""
    backend = TorchBackend(device="cpu", dtype="bfloat16")
    backend.start(seed=0)
    variable = backend.place("y", lambda: Constant(torch.full((2000,), 0.2)), SGD(), sharded=True)
    backend.activate(variable, variable.blocks.names)
    start = float(variable.module.value.double().mean())
    for _ in range(200):
        backend.backward(lambda b: variable().float().sum(), [torch.zeros(1)], wrt={variable: 1.0})
        backend.step(variable, lr=1e-6)
    assert variable.module.value.dtype == torch.bfloat16
    # five standard errors of the mean of 2000 roundings: 5 * 1e-3 * sqrt(0.2 * 0.8 / 2000)
    assert float(variable.module.value.double().mean()) - start == pytest.approx(-2e-4, abs=5e-5)
    # the drift also survives the block's going to sleep, when its master is dropped
    backend.activate(variable, frozenset())
    backend.activate(variable, variable.blocks.names)
    assert float(variable.masters["value"].double().mean()) - start == pytest.approx(-2e-4, abs=5e-5)
    backend.close()


def test_replicas_round_alike_so_that_equal_masters_stay_equal() -> None:
    backend = TorchBackend(device="cpu", dtype="bfloat16")
    backend.start(seed=0)
    z = place(backend)
    y = backend.replicate(z, "y")
    for variable in (y, z):
        backend.activate(variable, some(0, 2))
        train(backend, variable, lr=1e-5)
    assert not changed(y, snapshot(z))
    backend.close()


def test_stochastic_rounding_is_unbiased_and_exact_where_it_can_be() -> None:
    noise = torch.Generator().manual_seed(0)
    value = torch.tensor(1.0 + 0.3 / 128)  # 0.3 of the way between two neighbors, which are 1/128 apart
    rounded = round_stochastically(value.expand(100_000).contiguous(), noise).double()
    assert set(rounded.tolist()) == {1.0, 1.0 + 1 / 128}
    assert rounded.mean().item() == pytest.approx(value.item(), abs=5 * (0.3 * 0.7 / 1e5) ** 0.5 / 128)
    exact = torch.tensor([0.0, -1.5, 2.0**-20, -3.0e38]).bfloat16().float()
    assert torch.equal(round_stochastically(exact, noise).float(), exact)


class Constant(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value)

    def forward(self) -> Tensor:
        return self.value * 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", [AdamW(), SGD(momentum=0.9)])
def test_a_checkpoint_brings_back_everything_bit_for_bit(tmp_path: Path, dtype, optimizer) -> None:  # type: ignore[no-untyped-def]
    backend = TorchBackend(device="cpu", dtype=dtype)
    backend.start(seed=0)
    variable = place(backend, optimizer)
    backend.activate(variable, some(0, 1))
    train(backend, variable)
    backend.activate(variable, some(1, 2))  # one block with moments, one without
    backend.save(tmp_path, [variable], copy=False)()
    train(backend, variable)
    expected = snapshot(variable)

    twin = place(backend, optimizer)
    backend.load(tmp_path, [twin])
    assert twin.active == some(1, 2)
    train(backend, twin)
    assert not changed(twin, expected)
    backend.close()


def test_a_checkpoint_of_another_model_or_precision_is_refused(tmp_path: Path, backend: TorchBackend) -> None:
    variable = place(backend)
    backend.activate(variable, some(0))
    backend.save(tmp_path, [variable], copy=False)()
    low = TorchBackend(device="cpu", dtype="bfloat16")
    low.start(seed=0)
    with pytest.raises(InputError, match="another precision"):
        low.load(tmp_path, [place(low)])
    low.close()
    with pytest.raises(InputError, match="has no variable 'other', only y"):
        backend.load(tmp_path, [place(backend, name="other")])


def test_a_checkpoint_holds_no_pickle(tmp_path: Path, backend: TorchBackend) -> None:
    variable = place(backend)
    backend.save(tmp_path, [variable], copy=False)()
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_any_step(backend: TorchBackend, bad: float) -> None:
    variable = place(backend)
    backend.activate(variable, some(0))
    with pytest.raises(NonFiniteError, match="the loss is"):
        backend.backward(lambda b: loss(variable, b) * bad, rows(), wrt={variable: 1.0})
    assert not variable.gradients


def test_the_part_of_a_loss_that_is_not_finite_is_named(backend: TorchBackend) -> None:
    variable = place(backend)
    parts = {"clean": torch.tensor(1.0), "web": torch.tensor(float("inf"))}
    with pytest.raises(NonFiniteError, match=r"the loss is inf, in web \(inf\)"):
        backend.evaluate(lambda b: (loss(variable, b) + parts["web"], parts), rows())


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (nn.Dropout(0.1), r"inside\.0 \(Dropout\) drops activations at random"),
        (nn.LSTM(8, 8, num_layers=2, dropout=0.1), r"inside\.0 \(LSTM\) drops activations at random"),
        (nn.MultiheadAttention(8, 1, dropout=0.1), r"inside\.0 \(MultiheadAttention\) drops activations at random"),
        (nn.BatchNorm1d(8), r"inside\.0 \(BatchNorm1d\) keeps running statistics"),
    ],
)
def test_a_module_that_is_no_function_of_weights_and_batch_is_refused(
    backend: TorchBackend, part: nn.Module, words: str
) -> None:
    def build() -> nn.Module:
        module = Net()
        module.inside = nn.Sequential(part)
        return module

    for sharded in (True, False):
        with pytest.raises(InputError, match=rf"variable 'y': {words}"):
            backend.place("y", build, SGD(), sharded=sharded)
    backend.place("y", lambda: build().eval(), SGD(), sharded=True)


def test_weights_in_float16_are_refused_unless_they_are_converted() -> None:
    with pytest.raises(InputError, match=r"variable 'y' is in float16, .* set backend\.dtype to bfloat16 or float32"):
        TorchBackend(device="cpu").place("y", lambda: Net().half(), SGD(), sharded=True)
    converted = TorchBackend(device="cpu", dtype="float32").place("y", lambda: Net().half(), SGD(), sharded=True)
    assert {parameter.dtype for parameter in converted.module.parameters()} == {torch.float32}


def test_a_gradient_that_is_not_finite_is_named_and_moves_nothing(backend: TorchBackend) -> None:
    variable = place(backend)
    backend.activate(variable, some(0, 2))
    backend.backward(lambda b: loss(variable, b), rows(), wrt={variable: 1.0})
    variable.gradients["layers.2.inner.bias"][0] = float("nan")
    before = snapshot(variable)
    with pytest.raises(NonFiniteError, match=r"variable 'y'.*'layers\.2\.inner\.bias'"):
        backend.step(variable, lr=0.1)
    assert not changed(variable, before)


def test_forgetting_to_activate_or_to_ask_for_a_gradient_is_said(backend: TorchBackend) -> None:
    variable = place(backend)
    with pytest.raises(RuntimeError, match=r"no block of variable 'y' is active"):
        backend.backward(lambda b: loss(variable, b), rows(), wrt={variable: 1.0})
    backend.activate(variable, some(0))
    with pytest.raises(RuntimeError, match="has no gradient to step with"):
        backend.step(variable, lr=0.1)


def test_throughput_counts_what_batches_say_they_hold(backend: TorchBackend) -> None:
    variable = place(backend)
    backend.activate(variable, some(0))
    backend.backward(lambda b: loss(variable, b), rows(12, micro=5), wrt={variable: 1.0})
    assert backend.processed == 12


def test_a_device_that_is_not_there_is_an_input_error() -> None:
    with pytest.raises(InputError, match=r"backend\.device is 'cuda:99'"):
        TorchBackend(device="cuda:99").start(seed=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_plain_gradient_descent_is_the_step_of_torchs_sgd(dtype: torch.dtype, clip: float | None) -> None:
    """To rounding, as a fused multiplication and addition may be taken by one and not by the other."""
    backend = TorchBackend(device="cpu")
    backend.start(seed=0)
    y = backend.place("y", lambda: Net().to(dtype), SGD(clip=clip), sharded=True, blocks=find_blocks)
    backend.activate(y, y.blocks.names)
    theirs = copy.deepcopy(y.module).requires_grad_(True)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.3)
    for _ in range(5):
        backend.backward(lambda b: loss(y, b), rows(), wrt={y: 1})
        norm = backend.step(y, lr=0.3)
        loss(theirs, rows()[0]).backward()  # type: ignore[no-untyped-call]
        expected = torch.nn.utils.get_total_norm([p.grad for p in theirs.parameters() if p.grad is not None])
        assert norm == pytest.approx(float(expected), rel=20 * torch.finfo(dtype).eps)
        for parameter in theirs.parameters():
            if clip is not None and parameter.grad is not None:
                parameter.grad.mul_(clip / expected)  # torch's own clipping adds 1e-6 to the norm
        optimizer.step()
        optimizer.zero_grad()
    for mine, other in zip(y.module.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=50 * torch.finfo(dtype).eps, atol=50 * torch.finfo(dtype).eps)
    assert y.optimizer is None
    backend.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_that_hooks_take_train_alike_to_the_bit(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = []
    for most in (0, 1 << 16):
        monkeypatch.setattr("bilevel_backends.variable.SMALL", most)
        backend = TorchBackend(device="cpu", dtype=dtype)  # type: ignore[arg-type]
        backend.start(seed=0)
        y = place(backend)
        backend.activate(y, some(1, 3))
        train(backend, y, steps=3)
        assert bool(y._hooks) == (most == 0)
        assert all(parameter.grad is None for parameter in y.module.parameters())
        weights.append(backend.weights(y))
        backend.close()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("recomputed", [False, True])
def test_the_memory_of_a_closed_backend_is_free_without_the_collector(
    recomputed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bilevel_backends.variable.SMALL", 0)
    backend = TorchBackend(device="cpu", activation_checkpointing=recomputed)
    backend.start(seed=0)
    variable = place(backend)
    backend.activate(variable, variable.blocks.names)
    train(backend, variable)
    held = weakref.ref(variable.module)
    gc.collect()
    gc.disable()
    try:
        backend.close()
        del variable
        assert held() is None
    finally:
        gc.enable()


def test_a_large_model_is_placed_after_what_is_left_of_another_is_cleared_away(
    backend: TorchBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Cycle:
        def __init__(self) -> None:
            self.me = self

    gc.disable()
    try:
        held = weakref.ref(Cycle())
        place(backend, name="small")
        assert held() is not None
        monkeypatch.setattr("bilevel_backends.module_backend.LARGE", 0)
        place(backend, name="large")
        assert held() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(("dtype", "drawn"), [(None, 0), ("bfloat16", 1)])
def test_noise_is_drawn_only_where_something_is_rounded(
    dtype: str | None, drawn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = TorchBackend(device="cpu", dtype=dtype)  # type: ignore[arg-type]
    backend.start(seed=0)
    y = place(backend)
    backend.activate(y, y.blocks.names)
    backend.backward(lambda b: loss(y, b), rows(), wrt={y: 1})
    draws = []
    monkeypatch.setattr(
        "bilevel_backends.module_backend.generator",
        lambda *key: draws.append(key) or generator(*key),  # type: ignore[func-returns-value]
    )
    backend.step(y, lr=0.1)
    assert len(draws) == drawn
    backend.close()


def test_a_batch_that_is_there_and_cannot_be_changed_is_handed_on_as_it_is() -> None:
    @dataclass
    class Changeable:
        inputs: Tensor

    (batch,) = rows()
    cpu, elsewhere = torch.device("cpu"), torch.device("meta")
    assert to_device(batch, cpu) is batch
    moved = to_device(batch, elsewhere)
    assert (moved.inputs.device, moved.targets.device, moved.total) == (elsewhere, elsewhere, batch.total)
    assert batch.inputs.device == cpu
    assert to_device((changeable := Changeable(batch.inputs)), cpu) is not changeable


def test_a_batch_that_was_found_there_is_not_looked_through_again(
    backend: TorchBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    (upper,), (lower,), changeable = rows(), rows(), [torch.ones(2)]
    looked: list[Any] = []
    monkeypatch.setattr(
        "bilevel_backends.module_backend.to_device",
        lambda batch, device: looked.append(batch) or to_device(batch, device),  # type: ignore[func-returns-value]
    )
    for _ in range(2):
        assert backend.on_device(upper) is upper
        assert backend.on_device(lower) is lower
        backend.on_device(changeable)
    assert [id(batch) for batch in looked] == [id(batch) for batch in (upper, lower, changeable, changeable)]


@pytest.mark.parametrize("kind", [Tensor, nn.Parameter])  # torch itself deals with what is more than a tensor
def test_the_backward_pass_is_that_of_torch(kind: type[Tensor]) -> None:
    leaf = nn.Parameter(torch.linspace(-1, 1, 4))
    run_backward(torch.sin(leaf).sum().as_subclass(kind))
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, torch.cos(leaf.detach()))


def test_torch_settings_are_given_back() -> None:
    def settings() -> tuple[bool, bool]:
        return torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory

    before = settings()
    backend = TorchBackend(device="cpu")
    backend.start(seed=0)
    assert settings() == (True, False)
    backend.close()
    assert settings() == before


def test_initial_weights_depend_on_the_seed_alone() -> None:
    weights = []
    for seed in (0, 0, 1):
        backend = TorchBackend(device="cpu")
        backend.start(seed)
        torch.randn(3)  # whatever else draws random numbers
        weights.append(place(backend).module.out.weight.clone())
        backend.close()
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(("slower", "warned"), [(30.0, True), (1.0, False)])
def test_a_cpu_that_is_slow_in_bfloat16_is_said_to_be(
    slower: float, warned: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("bilevel_backends.torch_backend._bfloat16_slowdown", lambda: slower)
    backend = TorchBackend(device="cpu", dtype="bfloat16")
    backend.start(0)
    backend.close()
    assert ("30 times slower than float32 on this CPU" in caplog.text) == warned
    monkeypatch.setattr("bilevel_backends.torch_backend._bfloat16_slowdown", lambda: pytest.fail("float32 was measured"))
    backend = TorchBackend(device="cpu", dtype="float32")
    backend.start(0)
    backend.close()


def test_replicas_that_move_alike_are_rounded_alike() -> None:
    """In bfloat16 the noise of the rounding is that of the step, whatever the name of the variable."""
    backend = TorchBackend(device="cpu", dtype="bfloat16")
    backend.start(seed=0)
    z = backend.place("z", Net, AdamW(), sharded=True)
    y = backend.replicate(z, "y")
    for variable in (z, y):
        backend.activate(variable, z.blocks.names)
    for step in range(5):
        for variable in (z, y):
            backend.backward(lambda b, v=variable: loss(v, b), rows(seed=step), wrt={variable: 1})
            backend.step(variable, lr=1e-3)
    one, other = backend.weights(z), backend.weights(y)
    assert all(torch.equal(one[name], other[name]) for name in one)
    backend.close()


def test_a_large_eps_makes_a_step_proportional_to_a_small_gradient(backend: TorchBackend) -> None:
    """A gradient of 1e-4 moves by lr · 1e-4 / (1e-4 + 1e-2); the usual eps of 1e-8 would make it a full step."""
    x = backend.place("x", lambda: nn.Linear(1, 1, bias=False), AdamW(eps=1e-2), sharded=False)
    before = float(backend.weights(x)["weight"])
    backend.backward(lambda b: 1e-4 * x(b).sum(), [torch.ones(1, 1)], wrt={x: 1})
    backend.step(x, lr=1.0)
    assert before - float(backend.weights(x)["weight"]) == pytest.approx(1e-4 / (1e-4 + 1e-2), rel=1e-3)


def test_a_rewound_variable_is_as_it_was_marked_with_fresh_moments(backend: TorchBackend) -> None:
    y = backend.place("y", Net, AdamW(), sharded=True, blocks=find_blocks)
    backend.mark(y)
    start = backend.weights(y)

    def train() -> dict[str, Tensor]:
        for step in range(3):
            backend.activate(y, frozenset([f"layers.{step}"]))
            if step == 0:
                backend.rewind(y)
            backend.backward(lambda b: loss(y, b), rows(seed=step), wrt={y: 1})
            backend.step(y, lr=1e-2)
        return backend.weights(y)

    first, second = train(), train()
    assert any(not torch.equal(start[name], first[name]) for name in start)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_only_what_trains_between_two_rewinds_is_kept(backend: TorchBackend) -> None:
    y = backend.place("y", Net, AdamW(), sharded=True, blocks=find_blocks)
    backend.mark(y)
    for block in ("layers.0", "layers.1"):
        backend.activate(y, frozenset([block]))
    assert {name.rpartition(".inner.")[0] for name in y.marked or {}} == {"layers.0", "layers.1"}
    backend.rewind(y)
    assert {name.rpartition(".inner.")[0] for name in y.marked or {}} == {"layers.1"}


def test_a_variable_that_was_not_marked_cannot_be_rewound(backend: TorchBackend) -> None:
    y = backend.place("y", Net, AdamW(), sharded=True)
    with pytest.raises(RuntimeError, match="'y' was not marked"):
        backend.rewind(y)


@pytest.mark.parametrize(
    ("build", "compiled"), [(Net, ["Layer"] * 4), (lambda: nn.Linear(8, 1), ["Linear"])], ids=["with blocks", "without"]
)
def test_blocks_that_repeat_are_compiled_and_whole_modules_only_without_any(
    build: Callable[[], nn.Module], compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler itself takes seconds, and is torch's."""
    seen: list[str] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module: seen.append(type(module).__name__))
    backend = TorchBackend(device="cpu", compile=True, deterministic=False)
    backend.start(seed=0)
    backend.place("y", build, AdamW(), sharded=True, blocks=find_blocks)
    backend.close()
    assert seen == compiled
