"""The cost of a problem that does not state one: its own losses, on its own first batch, with variables without values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from bilevel.batch import map_tensors
from bilevel.blocks import Blocks
from bilevel.cost import Cost
from bilevel.errors import InputError, ProblemError
from bilevel.tracing import replace_parameters


@dataclass(frozen=True)
class Level:
    """One level of a problem.

    name: the name of the loss, for error messages.
    loss: the loss, called as `Problem.lower_loss`.
    draw: micro-batch size -> the micro-batches of a global batch; None takes the whole batch at once.
    """

    name: str
    loss: Callable[[Any, Any, Any], Any]
    draw: Callable[[int | None], Sequence[Any]]


def traced_cost(
    upper: Callable[[], nn.Module],
    lower: Callable[[], nn.Module],
    blocks: Callable[[nn.Module], Blocks],
    upper_level: Level,
    lower_level: Level,
) -> Cost:
    """Make a cost of a problem's parts.

    Both modules are built, once, and lose their values. The batches are real, so a loss may look at its data; it may not
    look at what it computes from the variables.

    A row is what a micro-batch of size 1 holds.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def without_values(tensor: Tensor) -> Tensor:
        if tensor.is_meta:  # as large modules may be built; fake tensors that say so do not go together with a batch
            return FakeTensor(mode, tensor, torch.device("cpu"))
        return mode.from_tensor(tensor)

    def empty(build: Callable[[], nn.Module]) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            module = build()
        replace_parameters(module, without_values)
        return module

    x = empty(upper)
    for parameter in x.parameters():
        parameter.register_post_accumulate_grad_hook(_drop)  # type: ignore[no-untyped-call]

    def loss_of(level: Level) -> Callable[[nn.Module, int], Tensor]:
        def loss(y: nn.Module, rows: int) -> Tensor:
            with _disable_current_modes():  # a problem may keep its batches, so that making them is seen once at most
                batch = level.draw(rows)[0]
            try:
                result = level.loss(x, y, map_tensors(torch.clone, batch))  # which is seen, as is a batch on a device
            except ProblemError:
                raise
            except Exception as error:  # whatever a loss does with tensors that have no values
                raise InputError(
                    f"{level.name} cannot be traced without the values of its variables: {error}; "
                    "mend it, or give the problem a method `cost` of its own"
                ) from error
            value: Tensor = result[0] if isinstance(result, tuple) else result
            return value

        return loss

    return Cost(
        build=lambda: empty(lower),
        blocks=blocks,
        loss=loss_of(lower_level),
        lower_rows=len(lower_level.draw(1)),
        upper_rows=len(upper_level.draw(1)),
        upper_loss=loss_of(upper_level),
    )


def _drop(parameter: Tensor) -> None:
    parameter.grad = None
