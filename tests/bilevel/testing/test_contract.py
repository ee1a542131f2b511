"""The contract checks accept what the package ships, and say what is wrong with what is wrong."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from bilevel import SGD, Blocks, ScaleBiO, Shard
from bilevel.solver import Metrics, State
from bilevel.testing.contract import ContractError, check_backend, check_problem, check_solver
from bilevel_backends.torch_backend import TorchBackend
from bilevel_problems.quadratic import Noise, Quadratic
from bilevel_problems.variables import ParameterVector

SOLVER = ScaleBiO(penalty=20.0, lr_x=0.05, lr_z=0.6, lower_steps=3, warmup=5, optimizer_x=SGD(), optimizer_z=SGD())


def test_the_torch_backend_keeps_the_contract() -> None:
    check_backend(lambda: TorchBackend(device="cpu"))


def test_scalebio_keeps_the_contract() -> None:
    check_solver(SOLVER)


@dataclasses.dataclass
class Growing(Quadratic):
    """Each call gives another batch."""

    calls: int = 0

    def lower_batch(self, index: int, shard: Shard) -> Any:
        self.calls += 1
        return super().lower_batch(index + self.calls, shard)


class MeanOfMicroBatches(Quadratic):
    """A micro-batch counts as a whole batch."""

    def upper_loss(self, x: Any, y: Any, batch: Noise) -> Any:
        return super().upper_loss(x, y, dataclasses.replace(batch, share=1.0))


class Deaf(Quadratic):
    """g does not depend on x."""

    def lower_loss(self, x: Any, y: Any, batch: Noise) -> Any:
        return (y() ** 2).sum() * batch.share


class Bare(ParameterVector):
    def forward(self) -> Any:
        return self.value


class Leaking(Quadratic):
    """x's forward gives the parameter itself."""

    def upper(self) -> nn.Module:
        return Bare(self.start_x)


class Overlapping(Quadratic):
    """A parameter in two blocks."""

    def blocks(self, module: nn.Module) -> Blocks:
        return Blocks({"a": ("value",), "b": ("value",)})


class Infinite(Quadratic):
    def summary(self, x: Any) -> Any:
        return {"phi": float("nan")}


@pytest.mark.parametrize(
    ("problem", "complaint"),
    [
        (Growing(lower_noise=1.0), "pure function of index and shard"),
        (MeanOfMicroBatches(batch_size=4), "carry its share"),
        (Deaf(), "does not depend on x"),
        (Leaking(), "returns a parameter"),
        (Overlapping(), "is in 2 blocks"),
        (Infinite(), "not a finite number"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Quadratic) else "",
)
def test_a_wrong_problem_is_told_what_is_wrong(problem: Quadratic, complaint: str) -> None:
    with pytest.raises(ContractError, match=complaint):
        check_problem(problem, tolerance=1e-9)


@dataclasses.dataclass(frozen=True)
class Remembering(ScaleBiO):
    """Keeps a counter where no checkpoint finds it."""

    def step(self, t: int, state: State, problem: Any, backend: Any) -> Metrics:
        state.seen = getattr(state, "seen", 0) + 1  # type: ignore[attr-defined]
        slower = dataclasses.replace(SOLVER, lr_x=0.05 / state.seen)  # type: ignore[attr-defined]
        return slower.step(t, state, problem, backend)


@dataclasses.dataclass(frozen=True)
class Uphill(ScaleBiO):
    def step(self, t: int, state: State, problem: Any, backend: Any) -> Metrics:
        return dataclasses.replace(SOLVER, lr_x=0.0).step(t, state, problem, backend)


@pytest.mark.parametrize(
    ("solver", "complaint"), [(Remembering, "belongs in `State.memory`"), (Uphill, "should have halved")]
)
def test_a_wrong_solver_is_told_what_is_wrong(solver: type[ScaleBiO], complaint: str) -> None:
    with pytest.raises(ContractError, match=complaint):
        check_solver(solver(warmup=0, optimizer_z=SGD()))


class Forgetful(TorchBackend):
    """Does not save moments."""

    def load(self, directory: Any, variables: Any) -> None:
        super().load(directory, variables)
        for variable in variables:
            if variable.optimizer is not None:
                variable.optimizer.state.clear()


class Thawing(TorchBackend):
    """Moves frozen blocks a little."""

    def step(self, variable: Any, *, lr: float) -> float:
        with torch.no_grad():
            for name, parameter in variable.module.named_parameters():
                if name not in variable.masters:
                    parameter.add_(1e-3)
        return super().step(variable, lr=lr)


class Greedy(TorchBackend):
    """Forgets the weight of `wrt`."""

    def backward(self, loss: Callable[..., Any], batch: Any, *, wrt: Any) -> Any:
        return super().backward(loss, batch, wrt=dict.fromkeys(wrt, 1.0))


class Idle(TorchBackend):
    """Assigns nothing."""

    def assign(self, target: Any, source: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("backend", "complaint"),
    [
        (Forgetful, "after load differs"),
        (Thawing, "frozen parameter"),
        (Greedy, "plain torch"),
        (Idle, "assign does not copy"),
    ],
)
def test_a_wrong_backend_is_told_what_is_wrong(backend: type[TorchBackend], complaint: str) -> None:
    with pytest.raises(ContractError, match=complaint):
        check_backend(lambda: backend(device="cpu"))
