"""A problem in few lines: variables that are tensors, and batches that are all the data."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bilevel import SGD, SOBA, InputError, Problem, ScaleBiO, Shard, fit
from bilevel.errors import ProblemError
from bilevel.tensor_module import TensorModule
from bilevel.testing.contract import check_problem
from bilevel_backends.torch_backend import TorchBackend
from tests.conftest import Distance


class Tensors(Distance):
    def __post_init__(self) -> None:
        super().__post_init__()
        self.start = torch.zeros(self.size, dtype=self.dtype)

    def upper(self) -> Tensor:
        return self.start

    def lower(self) -> Tensor:
        return self.start.requires_grad_()


class Whole(Problem[Any]):
    """Written as briefly as can be: min_x ½‖y - t‖² + ½‖x‖² with y = x."""

    upper_data = (torch.tensor([1.0, 2.0]),)
    lower_data = None

    def upper(self) -> Tensor:
        return torch.zeros(2)

    def lower(self) -> Tensor:
        return torch.zeros(2)

    def upper_loss(self, x: Any, y: Any, batch: Any) -> Tensor:
        return 0.5 * ((y() - batch[0]) ** 2).sum() + 0.5 * (x() ** 2).sum()

    def lower_loss(self, x: Any, y: Any, batch: Any) -> Tensor:
        assert batch is None
        return 0.5 * ((y() - x()) ** 2).sum()


SOLVER = ScaleBiO(penalty=100.0, lr_x=0.05, lr_z=0.1, optimizer_x=SGD(), optimizer_z=SGD(), warmup=0)


@pytest.mark.parametrize("micro_batch_size", [None, 1])
def test_a_tensor_is_a_variable_as_a_module_that_holds_it(micro_batch_size: int | None) -> None:
    runs = [
        fit(kind(noise=0.5), SOLVER, TorchBackend(micro_batch_size=micro_batch_size), steps=5).x
        for kind in (Tensors, Distance)
    ]
    assert torch.equal(runs[0]["value"], runs[1]["value"])
    assert runs[0]["value"].abs().min() > 0


def test_the_tensor_of_the_start_stays_as_it_is() -> None:
    problem = Tensors()
    fit(problem, SOLVER, TorchBackend(), steps=2)
    assert not problem.start.any()
    assert problem.start.grad is None


def test_whoever_builds_a_variable_gets_a_module() -> None:
    module = Tensors().lower()
    assert isinstance(module, nn.Module)
    assert module().data_ptr() != next(module.parameters()).data_ptr()


def test_a_tensor_without_dimensions_is_held_with_one_and_seen_without() -> None:
    """FSDP and DeepSpeed cannot shard or pack what has none."""

    class Scalar(Whole):
        def lower(self) -> Tensor:
            return torch.tensor(0.5)

        def upper_loss(self, x: Any, y: Any, batch: Any) -> Tensor:
            assert y().shape == ()
            return super().upper_loss(x, y, batch)

    assert Scalar().lower().value.shape == (1,)
    assert len(fit(Scalar(), SOLVER, TorchBackend(), steps=2).history) == 2


class Parts(Whole):
    """The same y, as a sum of two, and x as a matrix and a number."""

    def upper(self) -> Any:
        return {"matrix": torch.zeros(1, 2), "factor": torch.ones(())}

    def lower(self) -> Any:
        return nn.ModuleDict({"first": TensorModule(torch.zeros(2)), "scale": nn.Linear(2, 2)})

    def upper_loss(self, x: Any, y: Any, batch: Any) -> Tensor:
        return super().upper_loss(lambda: x("matrix")[0] * x("factor"), lambda: y("first"), batch)

    def lower_loss(self, x: Any, y: Any, batch: Any) -> Tensor:
        target = x("matrix")[0] * x("factor")
        return super().lower_loss(lambda: target, lambda: y("first"), batch) + y("scale", target).square().sum()


def test_named_parts_are_one_variable_and_each_is_called_by_its_name() -> None:
    check_problem(Parts())
    x = fit(Parts(), SOLVER, TorchBackend(), steps=300).x
    assert {name: tuple(value.shape) for name, value in x.items()} == {"matrix.value": (1, 2), "factor.value": (1,)}
    torch.testing.assert_close(x["matrix.value"][0] * x["factor.value"], torch.tensor([0.5, 1.0]), rtol=0, atol=0.1)


def test_a_part_that_is_none_is_named() -> None:
    class Misspelled(Parts):
        def lower_loss(self, x: Any, y: Any, batch: Any) -> Tensor:
            return y("frist").sum()

    class Odd(Parts):
        def upper(self) -> Any:
            return {"matrix": torch.zeros(1, 2, dtype=torch.long)}

    with pytest.raises(ProblemError, match="a loss calls 'frist', which is no part of the variable; did you mean 'first'?"):
        fit(Misspelled(), SOLVER, TorchBackend(), steps=1)
    with pytest.raises(
        ProblemError, match=r"Odd\.upper returned a tensor of shape \(1, 2\) and type torch.int64 as its part 'm"
    ):
        Odd().upper()


@pytest.mark.parametrize("build", [Tensors, Whole])
def test_a_problem_of_tensors_keeps_the_contract_and_has_a_cost(build: Callable[[], Problem[Any]]) -> None:
    problem = build()
    check_problem(problem)
    cost = problem.cost()
    assert cost.loss(cost.build(), 1).shape == ()


def test_all_data_are_the_batch_of_every_step() -> None:
    result = fit(Whole(), SOBA(lr_x=0.2, lr_z=0.5), TorchBackend(micro_batch_size=1), steps=60)
    torch.testing.assert_close(result.x["value"], torch.tensor([0.5, 1.0]), rtol=0, atol=1e-3)


@pytest.mark.parametrize(("shard", "into"), [(Shard(world_size=2), "2 processes"), (Shard(fold=(0, 2)), "folds")])
def test_data_that_are_one_sample_are_not_divided(shard: Shard, into: str) -> None:
    with pytest.raises(
        InputError, match=rf"Whole takes all of lower_data as one sample, which cannot be .* {into}; .*lower_batch"
    ):
        Whole().lower_batch(0, shard)


def test_a_problem_without_batches_and_data_is_told_what_to_add() -> None:
    class Without(Distance):
        lower_batch = Problem.lower_batch

    with pytest.raises(ProblemError, match="Without has neither a method lower_batch nor an attribute lower_data"):
        fit(Without(), SOLVER, TorchBackend(), steps=1)
