"""What backends offer solvers beside `backward` and `step`: vectors, and second derivatives."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from bilevel import SGD, InputError, Vector, find_blocks
from bilevel.backend import Backend
from bilevel_backends.torch_backend import TorchBackend
from bilevel_backends.variable import ModuleVariable


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3, dtype=torch.float64), nn.Linear(3, 3, dtype=torch.float64)])

    def forward(self, rows: Tensor) -> Tensor:
        for layer in self.layers:
            rows = torch.tanh(layer(rows))
        return rows


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor([0.5, -0.3], dtype=torch.float64))

    def forward(self) -> Tensor:
        return self.value * 1


ROWS = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)
HALVES = [ROWS[:2], ROWS[2:]]


@pytest.fixture
def placed() -> Iterator[tuple[TorchBackend, ModuleVariable, ModuleVariable]]:
    backend = TorchBackend(device="cpu")
    backend.start(0)
    x = backend.place("x", Scale, SGD(), sharded=False)
    y = backend.place("y", Net, SGD(), sharded=True)
    backend.activate(y, y.blocks.names)
    yield backend, x, y
    backend.close()


def loss(x: ModuleVariable, y: ModuleVariable):  # type: ignore[no-untyped-def]
    return lambda rows: ((x()[0].exp() * y(rows)) ** 2).sum() + x()[1] * y(rows).sum()


def test_a_taken_gradient_is_the_weighted_gradient_and_leaves_none(placed) -> None:  # type: ignore[no-untyped-def]
    backend, x, y = placed
    backend.backward(loss(x, y), HALVES, wrt={y: 2.0})
    taken = backend.take_gradient(y)
    for name, parameter in y.module.named_parameters():
        parameter.requires_grad_(True)
        (expected,) = torch.autograd.grad(loss(x, y)(ROWS), parameter)
        parameter.requires_grad_(False)
        torch.testing.assert_close(taken.parts[name], 2 * expected, rtol=1e-12, atol=1e-14)
    with pytest.raises(RuntimeError, match="no gradient"):
        backend.step(y, lr=1.0)
    assert backend.dot(backend.take_gradient(y), taken) == 0.0


def test_an_added_gradient_is_stepped_with_and_not_changed(placed) -> None:  # type: ignore[no-untyped-def]
    backend, _, y = placed
    before, v = backend.read(y), backend.read(y)
    backend.add_gradient(y, v, 0.25)
    backend.add_gradient(y, v, 0.25)
    backend.step(y, lr=1.0)
    for name in before.parts:
        torch.testing.assert_close(backend.read(y).parts[name], 0.5 * before.parts[name], rtol=1e-15, atol=0)
        assert torch.equal(v.parts[name], before.parts[name])


def test_vectors_add_and_scale_and_their_product_is_over_all_parameters() -> None:
    v = Vector({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}, whole=True)
    w = Vector({"a": torch.tensor([10.0, 20.0]), "b": torch.tensor([-1.0])}, whole=True)
    assert TorchBackend().dot(v, w) == 47.0
    combined = 2.0 * v + w - v
    assert combined.parts["a"].tolist() == [11.0, 22.0]
    assert combined.parts["b"].tolist() == [2.0]


def test_read_is_a_copy_and_write_sets_what_is_active_alone(placed) -> None:  # type: ignore[no-untyped-def]
    backend, _, y = placed
    everything = backend.weights(y)
    backend.activate(y, frozenset({"rest"}) if "rest" in y.blocks.names else frozenset({sorted(y.blocks.names)[0]}))
    v = backend.read(y)
    backend.write(y, 3.0 * v)
    after = backend.weights(y)
    for name, value in everything.items():
        torch.testing.assert_close(after[name], 3 * value if name in v.parts else value, rtol=0, atol=0)
        if name in v.parts:
            assert torch.equal(v.parts[name], value)


def test_written_values_reach_low_precision_parameters_and_their_masters() -> None:
    backend = TorchBackend(device="cpu", dtype="bfloat16")
    backend.start(0)
    y = backend.place("y", Net, SGD(), sharded=True)
    backend.activate(y, y.blocks.names)
    v = 3.0 * backend.read(y)
    backend.write(y, v)
    for name, part in v.parts.items():
        assert torch.equal(backend.read(y).parts[name], part)
        torch.testing.assert_close(backend.weights(y)[name].float(), part, rtol=2**-7, atol=0)
    backend.close()


@pytest.mark.parametrize("batch", [[ROWS], HALVES])
def test_second_derivatives_are_those_of_autograd_for_any_micro_batches(placed, batch) -> None:  # type: ignore[no-untyped-def]
    """Against the Hessian of the same loss in one flat vector of all parameters."""
    backend, x, y = placed
    generator = torch.Generator().manual_seed(1)
    direction = Vector(
        {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in backend.read(y).parts.items()}, True
    )
    slope = backend.backward_along(loss(x, y), batch, y, direction, wrt={x: -1.0, y: 3.0})
    got_x, got_y = backend.take_gradient(x), backend.take_gradient(y)

    names = list(direction.parts)
    shapes = [direction.parts[name].shape for name in names]
    flat = torch.cat([backend.read(y).parts[name].flatten() for name in names])
    along = torch.cat([direction.parts[name].flatten() for name in names])

    def value(x_: Tensor, y_: Tensor) -> Tensor:
        pieces = torch.split(y_, [s.numel() for s in shapes])
        weights = {name: piece.view(s) for name, piece, s in zip(names, pieces, shapes, strict=True)}
        scores = torch.func.functional_call(y.module, weights, (ROWS,))
        return ((x_[0].exp() * scores) ** 2).sum() + x_[1] * scores.sum()

    def slope_at(x_: Tensor, y_: Tensor) -> Tensor:
        return torch.func.grad(value, 1)(x_, y_) @ along

    x_ = backend.read(x).parts["value"]
    assert slope == pytest.approx(float(slope_at(x_, flat)), rel=1e-12)
    torch.testing.assert_close(got_x.parts["value"], -torch.func.grad(slope_at, 0)(x_, flat), rtol=1e-11, atol=1e-12)
    joined = torch.cat([got_y.parts[name].flatten() for name in names])
    torch.testing.assert_close(joined, 3 * torch.func.grad(slope_at, 1)(x_, flat), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("batch", [[ROWS], HALVES])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_second_derivatives_can_be_used_again_and_leave_vectors_as_they_are(
    batch: list[Tensor], checkpointing: bool
) -> None:
    """In several micro-batches each product is computed anew: all their graphs at once would take the memory of all."""
    backend = TorchBackend(device="cpu", activation_checkpointing=checkpointing)
    backend.start(0)
    x = backend.place("x", Scale, SGD(), sharded=False)
    y = backend.place("y", Net, SGD(), sharded=True, blocks=find_blocks)
    backend.activate(y, y.blocks.names)
    forwards = []
    y.module.register_forward_hook(lambda *_: forwards.append(1))
    first, second = backend.read(y), 2.0 * backend.read(y) - 0.5 * backend.read(y)
    before = {name: part.clone() for name, part in second.parts.items()}
    expected = []
    for vector, weights in ((first, {x: -1.0, y: 3.0}), (second, {y: 2.0})):
        backend.backward_along(loss(x, y), batch, y, vector, wrt=weights)
        expected += [backend.take_gradient(v) for v in weights]
    once = len(forwards) // 2
    found = []
    with backend.second_derivatives(loss(x, y), batch, y, wrt=(x, y)) as along:
        for vector, weights in ((first, {x: -1.0, y: 3.0}), (second, {y: 2.0})):
            along(vector, weights)
            found += [backend.take_gradient(v) for v in weights]
    assert len(forwards) - 2 * once == once * (1 if batch == [ROWS] else 2), "one micro-batch is passed forward once"
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(one.parts[name], other.parts[name]) for name in other.parts)
    assert all(torch.equal(second.parts[name], before[name]) for name in before)
    assert not any(parameter.requires_grad for parameter in y.module.parameters())
    backend.close()


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("batch", [[ROWS], HALVES])
def test_the_gradient_beside_second_derivatives_is_that_of_a_pass(batch: list[Tensor], dtype: str) -> None:
    """The same loss and parts, and the same gradient in the masters' precision; up to rounding, as they are summed anew."""
    backend = TorchBackend(device="cpu", dtype=dtype)
    backend.start(0)
    x = backend.place("x", Scale, SGD(), sharded=False)
    y = backend.place("y", Net, SGD(), sharded=True)
    backend.activate(y, y.blocks.names)
    kind = getattr(torch, dtype)

    def with_parts(rows: Tensor):  # type: ignore[no-untyped-def]
        value = ((x().to(kind)[0] * y(rows.to(kind))) ** 2).sum()
        return value, {"half": 0.5 * value}

    expected = backend.backward(with_parts, batch, wrt={y: 1.0})
    slopes = backend.take_gradient(y)
    with backend.second_derivatives(with_parts, batch, y, wrt=(x, y)) as derivatives:
        found, gradient = derivatives.gradient()
        derivatives(gradient, {x: 1.0})
    assert found.value == pytest.approx(expected.value, rel=1e-12)
    assert found.parts == pytest.approx(expected.parts, rel=1e-12)
    for name, part in slopes.parts.items():
        torch.testing.assert_close(gradient.parts[name], part, rtol=1e-12 if dtype == "float64" else 2**-7, atol=1e-14)
    assert backend.dot(backend.take_gradient(y), slopes) == 0.0, "the gradient is returned, not added"
    assert backend.dot(v := backend.take_gradient(x), v) > 0.0
    backend.close()


def test_second_derivatives_of_a_linear_loss_are_zero(placed) -> None:  # type: ignore[no-untyped-def]
    backend, x, _ = placed
    v = backend.read(x)
    assert backend.backward_along(lambda _: x().sum(), [ROWS], x, v, wrt={x: 1.0}) == pytest.approx(0.2)
    assert backend.dot(backend.take_gradient(x), v) == 0.0


def test_fused_attention_is_differentiated_twice() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(4))

        def forward(self, rows: Tensor) -> Tensor:
            q = (rows @ self.weight).view(1, 1, -1, 4)
            return nn.functional.scaled_dot_product_attention(q, q, q)

    backend = TorchBackend(device="cpu")
    backend.start(0)
    y = backend.place("y", Attention, SGD(), sharded=True)
    backend.activate(y, y.blocks.names)
    v, rows = backend.read(y), torch.linspace(-1, 1, 12).reshape(3, 4)
    backend.backward_along(lambda b: (y(b) ** 2).sum(), [rows], y, v, wrt={y: 1.0})
    assert backend.dot(backend.take_gradient(y), v) > 0
    backend.close()


def test_a_backend_without_second_derivatives_says_so(placed) -> None:  # type: ignore[no-untyped-def]
    backend, x, y = placed
    with pytest.raises(InputError, match="no second derivatives"):
        Backend.backward_along(backend, loss(x, y), [ROWS], y, backend.read(y), wrt={x: 1.0})


def test_a_loss_that_ignores_the_named_variable_gives_it_nothing(placed) -> None:  # type: ignore[no-untyped-def]
    backend, x, y = placed
    value = backend.backward(lambda rows: y(rows).sum(), [ROWS], wrt={x: 1.0})
    assert value.value != 0
    assert backend.dot(backend.take_gradient(x), backend.read(x)) == 0.0
