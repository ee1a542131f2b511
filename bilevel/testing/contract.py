"""Checks of what the package relies on, which authors of problems, solvers and backends can call from their tests.

    from bilevel.testing.contract import check_problem
    check_problem(MyProblem(...))

Each raises `ContractError`, which says what is wrong and what is expected.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bilevel.backend import Backend, Variable
from bilevel.blocks import find_blocks
from bilevel.constraint import ROUNDING, Constraint, by_parameter
from bilevel.errors import InputError, NonFiniteError
from bilevel.loop import fit
from bilevel.optimizer import SGD, AdamW
from bilevel.problem import Forward, Problem, Shard
from bilevel.record import Record
from bilevel.solver import Solver
from bilevel.testing.session import plugins


class ContractError(AssertionError):
    """A part does not do what the others rely on."""


# Problems.


def check_problem(problem: Problem[Any], *, index: int = 3, tolerance: float = 1e-5) -> None:
    """Check a problem on its batches number `index`.

    Batches are pure functions of index and seed; values and gradients depend neither on the micro-batch size nor on the
    number of processes; the lower loss depends on both variables and the upper loss on y; forward passes return new tensors;
    blocks cover every parameter once; the summary consists of finite numbers; x starts inside its constraint.

    tolerance: the relative tolerance of values and gradients. The default suits float32.
    """
    problem.prepare()
    with torch.random.fork_rng(devices=[]):
        x, y = _Watched(_seeded(problem.upper), "x"), _Watched(_seeded(problem.lower), "y")
        _same_parameters(y.module, _seeded(problem.lower))
    if problem.upper_constraint is not None:
        _check_constraints(problem.upper_constraint, x.module)
    _check_blocks(problem, y.module)
    for level, loss, batch in (
        ("upper", problem.upper_loss, problem.upper_batch),
        ("lower", problem.lower_loss, problem.lower_batch),
    ):
        _check_batches(level, batch, index)
        whole = _evaluate(loss, x, y, batch(index, Shard()))
        _require(math.isfinite(whole.value), f"the {level} loss is {whole.value}")
        needed = "xy" if level == "lower" else "y"
        for name in needed:
            gradients = whole.gradients[name]
            _require(bool(gradients), f"the {level} loss does not depend on {name}: it has no gradient in it")
            for parameter, gradient in gradients.items():
                _require(
                    bool(torch.isfinite(gradient).all()),
                    f"the gradient of the {level} loss in {name}.{parameter} is not finite",
                )
        for how, batches in (
            ("micro-batches of one sample", batch(index, Shard(micro_batch_size=1))),
            ("several processes", _dealt(batch, index)),
        ):
            _close(f"the {level} loss on {how}", _evaluate(loss, x, y, batches), whole, tolerance)
    with torch.no_grad():
        for key, value in problem.summary(x).items():
            _require(math.isfinite(float(value)), f"summary()[{key!r}] is {value}, not a finite number")


def _dealt(batch: Callable[[int, Shard], Sequence[Any]], index: int) -> list[Any]:
    """The batch as two processes get it, or three if it cannot be halved; in one piece if it cannot be divided at all."""
    for world_size in (2, 3):
        try:
            return [part for rank in range(world_size) for part in batch(index, Shard(rank=rank, world_size=world_size))]
        except InputError:
            continue
    return list(batch(index, Shard()))


@dataclasses.dataclass(frozen=True)
class _Result:
    value: float
    gradients: Mapping[str, Mapping[str, Tensor]]


class _Watched:
    """A module as a `Forward` that raises `ContractError` if a forward pass returns a parameter."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module = module
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.module(*args, **kwargs)
        storages = {p.untyped_storage().data_ptr() for p in self.module.parameters()}
        for tensor in _tensors(result):
            _require(
                tensor.untyped_storage().data_ptr() not in storages,
                f"the forward pass of {self.name} returns a parameter, or a view of one; return a new tensor, as sharded "
                "backends free the parameters after the forward pass",
            )
        return result


def _evaluate(loss: Callable[..., Any], x: _Watched, y: _Watched, batches: Sequence[Any]) -> _Result:
    total = 0.0
    for module in (x.module, y.module):
        module.zero_grad(set_to_none=True)
    for batch in batches:
        result = loss(x, y, batch)
        value = result[0] if isinstance(result, tuple) else result
        _require(value.dim() == 0, f"a loss must be a scalar, not of shape {tuple(value.shape)}")
        value.backward()
        total += float(value.detach().double())
    gradients = {
        v.name: {name: p.grad.detach().clone() for name, p in v.module.named_parameters() if p.grad is not None}
        for v in (x, y)
    }
    return _Result(total, gradients)


def _close(what: str, found: _Result, whole: _Result, tolerance: float) -> None:
    hint = "a micro-batch must carry its share of the global batch's weights"
    scale = max(abs(whole.value), 1e-6)
    _require(
        abs(found.value - whole.value) <= tolerance * scale,
        f"{what} is {found.value:.10g}, and {whole.value:.10g} on the whole batch; {hint}",
    )
    for name, gradients in whole.gradients.items():
        for parameter, gradient in gradients.items():
            other = found.gradients[name].get(parameter, torch.zeros_like(gradient))
            away = float((other - gradient).norm()) / max(float(gradient.norm()), 1e-6)
            _require(
                away <= tolerance, f"{what}: the gradient in {name}.{parameter} is wrong by {away:.1e} of its norm; {hint}"
            )


def _check_batches(level: str, batch: Callable[[int, Shard], Sequence[Any]], index: int) -> None:
    first, again = batch(index, Shard(seed=7)), batch(index, Shard(seed=7))
    batch(index + 1, Shard(seed=7))
    later = batch(index, Shard(seed=7))
    for other in (again, later):
        same = len(first) == len(other) and all(
            torch.equal(a, b) for a, b in zip(_tensors(list(first)), _tensors(list(other)), strict=True)
        )
        _require(same, f"{level}_batch({index}) differs from call to call; it must be a pure function of index and shard")


def _check_blocks(problem: Problem[Any], module: nn.Module) -> None:
    members = [name for names in problem.blocks(module).members.values() for name in names]
    for name in members:
        _require(
            members.count(name) == 1, f"blocks(): the parameter {name!r} is in {members.count(name)} blocks, not in one"
        )
    trainable = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    odd = sorted(trainable ^ set(members))
    _require(
        not odd, f"blocks(): {odd[:1]} is {'in no block' if odd[:1] and odd[0] in trainable else 'no trainable parameter'}"
    )


def _check_constraints(given: Constraint | Mapping[str, Constraint], module: nn.Module) -> None:
    """The start is inside; a projection keeps shape and type, and what it gives stays where it is."""
    start = {name: parameter.detach() for name, parameter in module.named_parameters()}
    for name, constraint in by_parameter(given, start).items():
        outside = start[name] + torch.randn(start[name].shape, generator=torch.Generator().manual_seed(0)).to(start[name])
        once = constraint.project(outside)
        same = once.shape == outside.shape and once.dtype == outside.dtype
        _require(same, f"upper_constraint of {name}: the projection is of shape {tuple(once.shape)} and type {once.dtype}")
        away = float((constraint.project(once) - once).norm())
        _require(
            away <= ROUNDING * max(1.0, float(once.norm())),
            f"upper_constraint of {name}: a projected point is moved by {away:.1e} when it is projected again",
        )


def _same_parameters(module: nn.Module, other: nn.Module) -> None:
    for (name, a), b in zip(module.state_dict().items(), other.state_dict().values(), strict=True):
        _require(torch.equal(a, b), f"two calls of lower() under the same seed differ in {name!r}")


def _seeded(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build()


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested batches."""
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


# Solvers.


def check_solver(
    solver: Solver[Any], *, problem: Problem[Any] | None = None, steps: int = 60, backend: str = "torch"
) -> None:
    """Check a solver, whose settings must suit the problem: by default `quadratic` with m = 2, n = 4, kappa = 3.

    It is reproducible, resumes exactly from a checkpoint, and lowers ‖∇Φ‖ (where the summary has a "gradient").
    """
    problem = problem or plugins().find("problems", "quadratic").load()(m=2, n=4, kappa=3.0)
    new_backend: Callable[[], Backend] = plugins().find("backends", backend).load()

    def history(count: int, output: Path | None = None, resume: bool = False) -> list[Record]:
        result = fit(problem, solver, new_backend(), steps=count, seed=1, output=output, checkpoint_every=7, resume=resume)
        return [dataclasses.replace(record, seconds=0.0, optimizer_bytes=0) for record in result.history]

    whole = history(steps)
    _require(
        history(steps) == whole, "two runs with the same seed differ; a solver may use nothing but the arguments of `step`"
    )
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "run"
        history(steps // 2, output)
        resumed = history(steps, output, resume=True)
    for record, expected in zip(resumed, whole, strict=True):
        _require(
            record == expected,
            f"a run resumed after step {steps // 2} differs from an uninterrupted one at step {record.step}; "
            "what is not a function of the step belongs in `State.memory` or in a variable",
        )
    gradients = [record.upper["gradient"] for record in whole if "gradient" in record.upper]
    if gradients:
        _require(
            gradients[-1] < 0.5 * gradients[0],
            f"‖∇Φ‖ went from {gradients[0]:.3g} to {gradients[-1]:.3g} in {steps} steps: it should have halved",
        )


# Backends.


class _Stack(nn.Module):
    """Three layers of the same kind, so that the module has blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, rows: Tensor) -> Tensor:
        for layer in self.layers:
            rows = torch.tanh(layer(rows))
        return rows


class _Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.ones(4))

    def forward(self) -> Tensor:
        return self.value * 1


def check_backend(new_backend: Callable[[], Backend], *, tolerance: float = 1e-5) -> None:
    """Check a backend, in one process; `new_backend` makes a new one.

    A trajectory equals that of plain torch; gradients go where `wrt` says; frozen blocks stay as they are, bit for bit;
    replicas are copies; vectors act as gradients do; what is not finite is refused before anything moves; save and load are
    exact.

    tolerance: the relative tolerance of the trajectory. The default suits float32 variables.
    """
    for optimizer in (SGD(), SGD(momentum=0.9), AdamW()):
        _check_trajectory(new_backend, optimizer, tolerance)
    _check_wrt_and_vectors(new_backend, tolerance)
    _check_frozen(new_backend)
    _check_refusal(new_backend)
    _check_save(new_backend)


@contextmanager
def _started(new_backend: Callable[[], Backend], optimizer: SGD | AdamW) -> Iterator[tuple[Backend, Variable, Variable]]:
    backend = new_backend()
    backend.start(0)
    try:
        x = backend.place("x", _Scale, SGD(), sharded=False)
        y = backend.place("y", _Stack, optimizer, sharded=True, blocks=find_blocks)
        backend.activate(y, y.blocks.names)
        yield backend, x, y
    finally:
        backend.close()


def _batch(index: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(index)
    return list(torch.randn(2, 3, 4, generator=generator))


def _loss(x: Forward, y: Forward) -> Callable[[Tensor], Tensor]:
    return lambda rows: ((y(rows) * x().to(rows.device)) ** 2).sum()


def _check_trajectory(new_backend: Callable[[], Backend], optimizer: SGD | AdamW, tolerance: float) -> None:
    with _started(new_backend, optimizer) as (backend, x, y):
        plain_x, plain_y = _Scale(), _Stack()
        plain_y.load_state_dict({name: value.float() for name, value in backend.weights(y).items()})
        if isinstance(optimizer, AdamW):
            plain: torch.optim.Optimizer = torch.optim.AdamW(plain_y.parameters(), lr=0.05, weight_decay=0.0)
        else:
            plain = torch.optim.SGD(plain_y.parameters(), lr=0.05, momentum=optimizer.momentum)
        for step in range(5):
            backend.backward(_loss(x, y), _batch(step), wrt={y: 0.5})
            backend.step(y, lr=0.05)
            plain.zero_grad()
            for rows in _batch(step):
                (0.5 * _loss(plain_x, plain_y)(rows)).backward()  # type: ignore[no-untyped-call]
            plain.step()
        for name, value in plain_y.state_dict().items():
            away = float((backend.weights(y)[name].float() - value).norm() / value.norm())
            _require(away <= tolerance, f"after 5 steps of {optimizer} {name!r} differs from plain torch by {away:.1e}")


def _check_wrt_and_vectors(new_backend: Callable[[], Backend], tolerance: float) -> None:
    with _started(new_backend, SGD()) as (backend, x, y):
        backend.backward(_loss(x, y), _batch(0), wrt={x: 2.0})
        _require(backend.dot(g := backend.take_gradient(y), g) == 0, "a variable that `wrt` does not name got a gradient")
        twice = backend.take_gradient(x)
        _require(backend.dot(g := backend.take_gradient(x), g) == 0, "take_gradient leaves a gradient behind")
        backend.backward(_loss(x, y), _batch(0), wrt={x: 1.0, y: 1.0})
        once = backend.take_gradient(x)
        away = backend.dot(d := twice - 2.0 * once, d) ** 0.5 / backend.dot(twice, twice) ** 0.5
        _require(away <= tolerance, "the gradient is not proportional to its weight in `wrt`")
        before = backend.read(x)
        backend.add_gradient(x, once, 3.0)
        backend.step(x, lr=0.1)
        moved = before - backend.read(x)
        away = backend.dot(d := moved - 0.3 * once, d) ** 0.5 / backend.dot(moved, moved) ** 0.5
        _require(away <= 10 * tolerance, "a step with an added gradient is not lr * weight * vector")
        backend.write(x, before)
        _require(backend.dot(d := backend.read(x) - before, d) == 0, "read does not return what was written")
        z = backend.replicate(y, "z")
        backend.activate(z, y.active)
        _require(_equal(backend.weights(y), backend.weights(z)), "a replica differs from its source")
        backend.backward(_loss(x, y), _batch(1), wrt={y: 1.0})
        backend.step(y, lr=0.1)
        _require(not _equal(backend.weights(y), backend.weights(z)), "a replica moves with its source")
        backend.assign(z, y)
        _require(_equal(backend.weights(y), backend.weights(z)), "assign does not copy the weights")


def _check_frozen(new_backend: Callable[[], Backend]) -> None:
    with _started(new_backend, AdamW()) as (backend, x, y):
        backend.backward(_loss(x, y), _batch(0), wrt={y: 1.0})
        backend.step(y, lr=0.1)
        everything = backend.optimizer_bytes(y)
        before = backend.weights(y)
        backend.activate(y, frozenset({y.blocks.repeated[1]}))
        _require(backend.optimizer_bytes(y) < everything, "the optimizer state of frozen blocks is not freed")
        backend.backward(_loss(x, y), _batch(1), wrt={y: 1.0})
        backend.step(y, lr=0.1)
        active = set(y.blocks.parameters(y.active))
        for name, value in backend.weights(y).items():
            if name in active:
                _require(not torch.equal(value, before[name]), f"the active parameter {name!r} did not move")
            else:
                _require(torch.equal(value, before[name]), f"the frozen parameter {name!r} changed")


def _check_refusal(new_backend: Callable[[], Backend]) -> None:
    with _started(new_backend, SGD()) as (backend, x, y):
        before = backend.weights(y)
        try:
            backend.backward(lambda rows: _loss(x, y)(rows) * math.inf, _batch(0), wrt={y: 1.0})
        except NonFiniteError:
            pass
        else:
            raise ContractError("an infinite loss is not refused with NonFiniteError")
        _require(_equal(before, backend.weights(y)), "a variable moved although the loss was not finite")


def _check_save(new_backend: Callable[[], Backend]) -> None:
    def go_on(backend: Backend, x: Variable, y: Variable, steps: range) -> dict[str, Tensor]:
        for step in steps:
            backend.backward(_loss(x, y), _batch(step), wrt={x: 1.0, y: 1.0})
            backend.step(y, lr=0.05)
            backend.step(x, lr=0.05)
        return {**backend.weights(y), **backend.weights(x)}

    with tempfile.TemporaryDirectory() as directory:
        with _started(new_backend, AdamW()) as (backend, x, y):
            go_on(backend, x, y, range(3))
            write = backend.save(Path(directory), [x, y], copy=True)
            expected = go_on(backend, x, y, range(3, 6))
            write()  # as another thread would, while the steps are taken
        with _started(new_backend, AdamW()) as (backend, x, y):
            backend.load(Path(directory), [x, y])
            found = go_on(backend, x, y, range(3, 6))
    _require(
        _equal(expected, found),
        "a trajectory after load differs from the one that was saved; it must be the same bit for bit",
    )


def _equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ContractError(message)
