"""A forward and backward pass of many runs at once: a loss, differentiated and mapped over the runs by `torch.func`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from bilevel.backend import Variable
from bilevel.errors import InputError
from bilevel.many import Together
from bilevel.problem import Problem

Tensors = Sequence[Tensor]
Outcome = tuple[Tensor, Mapping[str, Tensor], Sequence[Tensor]]
"""The losses, their named parts, and the gradients; each with a first dimension for the runs."""

CHECKED = 2
"""How often a recorded pass is compared with the loss itself: at its first call, and at one that sees other values."""


class Pass:
    """A loss with its gradients in some variables, for all runs.

    The tensor operations are recorded once and repeated from then on, without the Python code of the loss and the
    transformations of `torch.func`, which take much longer than small operations do.

    loss: a function of one run's batch that calls the variables.
    variables: all variables that it may call.
    wrt: those in which it is differentiated.
    compile: whether the recorded operations are compiled (torch.compile).
    """

    def __init__(self, loss: Callable[[Any], Any], variables: Sequence[Any], wrt: Sequence[Any], *, compile: bool) -> None:
        self.loss = loss
        self.variables = variables
        self.wrt = wrt
        self.compile = compile
        self.parts: list[str] = []
        self.recorded: Callable[..., Tensors] | None = None
        self.checked = 0

    def __call__(self, batch: Together) -> Outcome:
        """Run the pass. Raises `InputError` if torch cannot map the loss over runs."""
        inputs = [tensor for variable in self.variables for tensor in variable.tensors()]
        data = batch.tensors
        if self.recorded is None:
            self.recorded = self._record(batch, inputs, data)
        found = self.recorded(*inputs, *data)
        if self.checked < CHECKED:
            self.checked += 1
            self._compare(found, self._mapped(batch)(*inputs, *data))
        value, *rest = found
        return value, dict(zip(self.parts, rest, strict=False)), rest[len(self.parts) :]

    def _record(self, batch: Together, inputs: Tensors, data: Tensors) -> Callable[..., Tensors]:
        self._call_plainly(batch, data)
        mapped = self._mapped(batch)
        try:
            with torch.no_grad():
                graph = make_fx(mapped)(*inputs, *data)
        except (RuntimeError, NotImplementedError) as error:
            raise InputError(
                f"{_name(self.loss)} cannot be computed for many runs at once: {error}; write it with tensor operations "
                "alone, or call `fit` for each run"
            ) from error
        graph.graph.eliminate_dead_code()
        graph.recompile()
        return torch.compile(graph, fullgraph=True) if self.compile else graph.forward

    def _call_plainly(self, batch: Together, data: Tensors) -> None:
        """Compute the loss of the first run, so that what a problem computes once and keeps is not recorded as an operation."""
        for variable in self.variables:
            variable.bind([tensor[0] for tensor in variable.tensors()])
        try:
            with torch.no_grad():
                self.loss(batch.with_tensors(data if batch.shared else [tensor[0] for tensor in data]))
        finally:
            for variable in self.variables:
                variable.bind(None)

    def _mapped(self, batch: Together) -> Callable[..., Tensors]:
        """The pass as a function of the tensors of all variables and of the batch."""
        ends = [0]
        for variable in self.variables:
            ends.append(ends[-1] + len(variable.tensors()))

        def one(*tensors: Tensor) -> Tensors:
            values = [tensors[a:b] for a, b in zip(ends, ends[1:], strict=False)]
            data = batch.with_tensors(tensors[ends[-1] :])
            differentiated = [self.variables.index(variable) for variable in self.wrt]

            def scalar(wrt: list[Tensors]) -> tuple[Tensor, tuple[Tensor, list[Tensor]]]:
                own = dict(zip(differentiated, wrt, strict=True))
                for k, variable in enumerate(self.variables):
                    variable.bind(own.get(k, values[k]))
                try:
                    result = self.loss(data)
                finally:
                    for variable in self.variables:
                        variable.bind(None)
                value, named = result if isinstance(result, tuple) else (result, {})
                self.parts = list(named)
                return value, (value, [part.to(value) for part in named.values()])

            if not self.wrt:
                _, (value, parts) = scalar([])
                return [value, *parts]
            slopes, (value, parts) = torch.func.grad(scalar, has_aux=True)([values[k] for k in differentiated])
            return [value, *parts, *(slope for group in slopes for slope in group)]

        data_dims = (None if batch.shared else 0,) * len(batch.tensors)
        return torch.vmap(one, in_dims=((0,) * ends[-1] + data_dims))

    def _compare(self, found: Tensors, right: Tensors) -> None:
        for mine, other in zip(found, right, strict=True):
            tolerance = 1e-9 if mine.dtype == torch.float64 else 1e-4
            if not torch.allclose(mine, other, rtol=tolerance, atol=tolerance, equal_nan=True):
                raise InputError(
                    f"{_name(self.loss)} gives other numbers when it is called again, so that it cannot be recorded: it must "
                    "be a function of its variables and its batch alone; draw what is random in `lower_batch` and "
                    "`upper_batch`"
                )


def key_of(loss: Callable[[Any], Any], wrt: Sequence[Variable], batch: Together) -> tuple[Any, ...] | None:
    """What decides the operations of a pass: two calls with one key do the same, up to the values of tensors.

    None if that cannot be told: the function has captured something other than variables, problems, numbers and names.
    """
    function = _identity(loss)
    if function is None:
        return None
    return (function, tuple(map(id, wrt)), batch.form)


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
    for cell in getattr(loss, "__closure__", None) or ():
        if isinstance(cell.cell_contents, MethodType):
            return _name(cell.cell_contents)
    names = [name for name in getattr(getattr(loss, "__code__", None), "co_names", ()) if name.endswith("_loss")]
    return names[0] if names else "the loss"
