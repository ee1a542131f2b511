"""What a problem's methods are given, and what they may return."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from bilevel import ScaleBiO, fit
from bilevel.errors import ProblemError
from bilevel.testing.contract import check_problem
from bilevel_backends.torch_backend import TorchBackend
from tests.conftest import Distance

USES: dict[str, Callable[[Any], Any]] = {
    "attribute": lambda y: y.weight,
    "attribute with a default": lambda y: getattr(y, "value", 1.0),
    "method": lambda y: y.parameters(),
    "internals": lambda y: y._forward,
    "assignment": lambda y: setattr(y, "weight", 2.0),
    "item": lambda y: y[0],
    "power": lambda y: y**2,
    "product": lambda y: 2 * y,
    "product with a tensor": lambda y: torch.ones(2) * y,
    "function of torch": lambda y: torch.sum(y),
    "list for torch": lambda y: torch.stack([y, y]),
    "functional call": lambda y: torch.func.functional_call(y, {}, ()),
    "comparison": lambda y: y == 3,
    "truth": lambda y: bool(y),
    "number": lambda y: float(y),
    "iteration": lambda y: list(y),
}


def plan(problem: Distance) -> None:
    cost = problem.cost()
    cost.loss(cost.build(), 1)


WAYS: dict[str, Callable[[Any], Any]] = {
    "fit": lambda problem: fit(problem, ScaleBiO(warmup=0), TorchBackend(), steps=1),
    "check": check_problem,
    "plan": plan,
}


class Using(Distance):
    """Uses y in its lower loss as a test says."""

    use: Callable[[Any], Any]

    def lower_loss(self, x: Any, y: Any, batch: Any) -> torch.Tensor:
        self.use(y)
        return super().lower_loss(x, y, batch)


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_loss_is_told_what_to_do_if_it_asks_a_variable_for_more_than_a_call(use: Callable[[Any], Any]) -> None:
    problem = Using()
    problem.use = use
    with pytest.raises(ProblemError, match=r"a loss uses y.*can only be called, as in y\(\.\.\.\)"):
        problem.lower_loss(nn.Linear(2, 2), nn.Linear(2, 2), problem.lower_batch(0, TorchBackend().shard)[0])


@pytest.mark.parametrize("how", WAYS)
def test_a_backend_a_check_and_a_plan_all_hide_what_a_variable_has(how: str) -> None:
    problem = Using()
    problem.use = lambda y: y.weight
    with pytest.raises(ProblemError, match=r"uses y\.weight"):
        WAYS[how](problem)


RETURNS: dict[str, tuple[str, Any, str]] = {
    "x is a tensor of integers": (
        "upper",
        torch.ones(2).long(),
        r"a tensor of shape \(2,\).*int64; return a torch\.nn\.Module.*, or a tensor of f",
    ),
    "y is a tuple": ("lower", (nn.Linear(1, 1),), r"a value of the type tuple; return a torch\.nn\.Module"),
    "loss is a float": ("lower_loss", 1.0, "a value of the type float; return a scalar tensor"),
    "loss is a vector": ("upper_loss", torch.ones(2), r"shape \(2,\).*return a scalar tensor"),
    "loss is an integer": ("upper_loss", torch.tensor(2), "int64; return a scalar tensor"),
    "loss is None": ("lower_loss", None, "None; return a scalar tensor"),
    "parts are a list": ("lower_loss", (torch.tensor(1.0), [1.0]), "list with the loss; return a mapping"),
    "batch is a tensor": ("lower_batch", torch.ones(2), "return the list of this process's micro-batches"),
    "batch is a generator": ("lower_batch", iter([1]), "return the list of this process's micro-batches"),
    "summary is a list": ("summary", [1.0], "return a mapping from names to numbers"),
    "summary has text": ("summary", {"a": "b"}, "type str as 'a'; return one number"),
}


@pytest.mark.parametrize(("method", "returned", "message"), RETURNS.values(), ids=RETURNS)
@pytest.mark.parametrize("how", ["fit", "check"])
def test_what_a_method_returns_wrongly_is_named_with_the_method(how: str, method: str, returned: Any, message: str) -> None:
    problem = type("Wrong", (Distance,), {method: lambda self, *arguments: returned})()
    with pytest.raises(ProblemError, match=rf"Wrong\.{method} returned .*{message}"):
        WAYS[how](problem)
