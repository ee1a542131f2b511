"""A forward and backward pass of many runs at once: a loss, mapped over the runs by `torch.func.vmap`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from bilevel.backend import Variable
from bilevel.errors import InputError
from bilevel.many import Together
from bilevel.problem import Problem
from bilevel_backends.recording import NotRecordable, record

Tensors = Sequence[Tensor]
Outcome = tuple[Tensor, Mapping[str, Tensor], Sequence[Tensor]]
"""The losses, their named parts, and the gradients; each with a first dimension for the runs."""


class Pass:
    """A loss with its gradients in some variables, for all runs.

    Its tensor operations are recorded and repeated; see `bilevel_backends.recording`.

    loss: a function of one run's batch that calls the variables.
    variables: all variables that it may call.
    wrt: those in which it is differentiated.
    of: if this is given, what is differentiated is <gradient of the loss in this variable, a vector> instead.
    """

    def __init__(
        self, loss: Callable[[Any], Any], variables: Sequence[Any], wrt: Sequence[Any], of: Any | None = None
    ) -> None:
        self.loss = loss
        self.variables = variables
        self.wrt = wrt
        self.of = of
        self.parts: list[str] = []
        self.lower: list[Any] = []  # the variables at which the loss is the lower loss
        self.calls = 0
        self.recordable = True
        self.recorded: Callable[..., Tensors] | None = None
        self.repeat: Callable[..., Tensors] | None = None

    def __call__(self, batch: Together, vector: Tensors = ()) -> Outcome:
        """Run the pass. Raises `InputError` if torch cannot map the loss over runs.

        vector: for every parameter of the variable `of`, in its order.
        """
        inputs = [tensor for variable in self.variables for tensor in variable.tensors()]
        inputs += [*batch.tensors, *vector]
        found = self.repeat(*inputs) if self.repeat is not None else self._first_calls(batch, inputs)
        value, *rest = found
        return value, dict(zip(self.parts, rest, strict=False)), rest[len(self.parts) :]

    def _first_calls(self, batch: Together, inputs: Tensors) -> Tensors:
        """Record at the second call, and compare at the third, which sees other values."""
        self.calls += 1
        if self.calls == 1:
            self._call_plainly(batch)
        mapped = self._mapped(batch)
        try:
            if self.calls == 1 or not self.recordable:
                return mapped(*inputs)
            if self.recorded is None:
                self.recorded, found = record(mapped, inputs)
                return found
            found = mapped(*inputs)
        except NotRecordable:
            self.recordable = False
            return mapped(*inputs)
        except (RuntimeError, NotImplementedError) as error:
            raise InputError(
                f"{_name(self.loss)} cannot be computed for many runs at once: {error}; write it with tensor operations "
                "alone, or call `fit` for each run"
            ) from error
        self._compare(self.recorded(*inputs), found)
        self.repeat = self.recorded
        return found

    def _compare(self, mine: Tensors, right: Tensors) -> None:
        """Raise `InputError` if the recorded operations do not give what the loss gives."""
        for a, b in zip(mine, right, strict=True):
            tolerance = 1e-9 if a.dtype == torch.float64 else 1e-4
            if not torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True):
                raise InputError(
                    f"{_name(self.loss)} gives other numbers when it is called again: it must be a function of its "
                    "variables and its batch alone; draw what is random in `lower_batch` and `upper_batch`"
                )

    def _call_plainly(self, batch: Together) -> None:
        """Compute the loss of the first run, so that what a problem computes once and keeps is not recorded."""
        for variable in self.variables:
            variable.bind([tensor[0] for tensor in variable.tensors()])
            variable.last_loss = ""
        try:
            with torch.no_grad():
                self.loss(batch.with_tensors(batch.tensors if batch.shared else [tensor[0] for tensor in batch.tensors]))
        finally:
            for variable in self.variables:
                variable.bind(None)
        self.lower = [variable for variable in self.variables if variable.last_loss == "lower_loss"]

    def _mapped(self, batch: Together) -> Callable[..., Tensors]:
        """The pass as a function of the tensors of all variables and of the batch."""
        ends = [0]
        for variable in self.variables:
            ends.append(ends[-1] + len(variable.tensors()))
        slices = [slice(a, b) for a, b in pairwise(ends)]

        def forward(*tensors: Tensor) -> Tensors:
            for variable, own in zip(self.variables, slices, strict=True):
                variable.bind(tensors[own])
            try:
                result = self.loss(batch.with_tensors(tensors[ends[-1] :]))
            finally:
                for variable in self.variables:
                    variable.bind(None)
            value, named = result if isinstance(result, tuple) else (result, {})
            self.parts = [] if self.of is not None else list(named)
            return [value, *(part.to(value) for part in named.values())]

        data = ends[-1] + len(batch.tensors)
        losses = torch.vmap(forward, in_dims=(0,) * ends[-1] + (None if batch.shared else 0,) * len(batch.tensors))

        def places(variable: Any) -> list[int]:
            return list(range(ends[-1])[slices[self.variables.index(variable)]])[: len(variable.values)]

        wrt = [k for variable in self.wrt for k in places(variable)]
        of = [] if self.of is None else places(self.of)

        def run(*tensors: Tensor) -> Tensors:
            inputs = list(tensors)
            for k in {*wrt, *of}:
                inputs[k] = inputs[k].detach().requires_grad_()
            with torch.set_grad_enabled(bool(wrt)):
                found = losses(*inputs[:data])
                # no run's loss depends on the values of another: the gradient of their sum is that of each in its own values
                value = found[0].sum()
                if of:
                    slopes = _gradients(value, [inputs[k] for k in of], create_graph=True)
                    products = [(slope * v).flatten(1).sum(1) for slope, v in zip(slopes, inputs[data:], strict=True)]
                    found = [sum(products[1:], products[0])]
                    value = found[0].sum()
            return [*(value.detach() for value in found), *_gradients(value, [inputs[k] for k in wrt])]

        return run


def _gradients(value: Tensor, wrt: Tensors, *, create_graph: bool = False) -> Tensors:
    """The gradients; zero where the value does not depend on a tensor."""
    if not wrt or not value.requires_grad:
        return [torch.zeros_like(tensor) for tensor in wrt]
    return torch.autograd.grad(value, wrt, create_graph=create_graph, allow_unused=True, materialize_grads=True)


def key_of(
    loss: Callable[[Any], Any], wrt: Sequence[Variable], of: Variable | None, batch: Together
) -> tuple[Any, ...] | None:
    """What decides the operations of a pass: two calls with one key do the same, up to the values of tensors.

    None if that cannot be told: the function has captured something other than variables, problems, numbers and names.
    """
    function = _identity(loss)
    if function is None:
        return None
    return (function, tuple(map(id, wrt)), id(of), batch.form)


def _identity(value: Any) -> Any:
    """Something hashable that tells values apart; None if there is no such thing."""
    if isinstance(value, int | float | str | bool):
        return value
    if isinstance(value, Variable | Problem | nn.Module):
        return id(value)
    if isinstance(value, MethodType):
        owner = _identity(value.__self__)
        return None if owner is None else (owner, value.__func__)
    if isinstance(value, partial):
        return _all(value.func, *value.args, *value.keywords.items())
    if isinstance(value, tuple):
        return _all(*value)
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if isinstance(cell, CellType)]
        captured = _all(*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
        return None if captured is None else (value.__code__, captured)
    return None


def _all(*values: Any) -> Any:
    found = tuple(map(_identity, values))
    return None if any(one is None for one in found) else found


def _name(loss: Callable[[Any], Any]) -> str:
    """The problem's function behind a solver's, if there is one."""
    if isinstance(loss, partial):
        return _name(loss.func)
    if isinstance(loss, MethodType):
        return f"{type(loss.__self__).__name__}.{loss.__name__}"
    captured = [cell.cell_contents for cell in getattr(loss, "__closure__", None) or ()]
    for value in captured:
        if isinstance(value, MethodType):
            return _name(value)
    names = [name for name in getattr(getattr(loss, "__code__", None), "co_names", ()) if name.endswith("_loss")]
    for value in captured:
        if isinstance(value, Problem) and names:
            return _name(getattr(value, names[0]))
    return "the loss"
