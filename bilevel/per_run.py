"""Numbers of which each of several runs that go side by side has its own."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from bilevel.errors import InputError


class PerRun:
    """One number for each run, with the arithmetic of numbers. It stands where a solver expects a float.

    values: shape (runs,), float64.

    A comparison is true or false only if it comes out alike in all runs. Raises `InputError`, naming the line, where it does
    not, and wherever a single number is asked for: what follows would be right for one run and wrong for the others.
    """

    __slots__ = ("values",)
    __array_ufunc__ = None  # so that numpy leaves the arithmetic to this class
    __hash__ = object.__hash__

    def __init__(self, values: Tensor) -> None:
        self.values = values

    @staticmethod
    def of(numbers: Sequence[float], device: torch.device | None = None) -> PerRun:
        """The numbers of all runs, in their order."""
        return PerRun(torch.tensor(numbers, dtype=torch.float64, device=device))

    def like(self, tensor: Tensor) -> Tensor:
        """The numbers in the precision of a tensor whose first dimension is that of runs, to be multiplied with it."""
        return self.values.to(tensor.device, tensor.dtype).view(-1, *[1] * (tensor.dim() - 1))

    def __add__(self, other: Any) -> Any:
        return self._with(other, operator.add)

    def __sub__(self, other: Any) -> Any:
        return self._with(other, operator.sub)

    def __mul__(self, other: Any) -> Any:
        if isinstance(other, Tensor):
            return self.like(other) * other
        return self._with(other, operator.mul)

    def __truediv__(self, other: Any) -> Any:
        return self._with(other, operator.truediv)

    def __pow__(self, other: Any) -> Any:
        return self._with(other, operator.pow)

    def __radd__(self, other: Any) -> Any:
        return self._with(other, lambda a, b: b + a)

    def __rsub__(self, other: Any) -> Any:
        return self._with(other, lambda a, b: b - a)

    def __rmul__(self, other: Any) -> Any:
        return self * other

    def __rtruediv__(self, other: Any) -> Any:
        return self._with(other, lambda a, b: b / a)

    def __neg__(self) -> PerRun:
        return PerRun(-self.values)

    def __abs__(self) -> PerRun:
        return PerRun(self.values.abs())

    def __eq__(self, other: object) -> bool:
        return self._agreed(other, operator.eq)

    def __ne__(self, other: object) -> bool:
        return self._agreed(other, operator.ne)

    def __lt__(self, other: Any) -> bool:
        return self._agreed(other, operator.lt)

    def __le__(self, other: Any) -> bool:
        return self._agreed(other, operator.le)

    def __gt__(self, other: Any) -> bool:
        return self._agreed(other, operator.gt)

    def __ge__(self, other: Any) -> bool:
        return self._agreed(other, operator.ge)

    def __bool__(self) -> bool:
        return self._agreed(0.0, operator.ne)

    def __float__(self) -> float:
        self._refuse("asks for one number where every run has its own")

    def __index__(self) -> int:
        self._refuse("asks for one number where every run has its own")

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        self._refuse("asks for one number where every run has its own")

    def __iter__(self) -> Any:
        self._refuse("asks for several numbers where every run has one of its own")

    def __format__(self, spec: str) -> str:
        return repr(self) if not spec else self._refuse("asks for one number where every run has its own")

    def __repr__(self) -> str:
        return f"PerRun({self.values.tolist()})"

    def _with(self, other: Any, operation: Callable[[Any, Any], Any]) -> Any:
        if isinstance(other, PerRun):
            return PerRun(operation(self.values, other.values))
        if isinstance(other, int | float):
            return PerRun(operation(self.values, other))
        return NotImplemented

    def _agreed(self, other: Any, comparison: Callable[[Any, Any], Any]) -> bool:
        answers: Tensor = comparison(self.values, other.values if isinstance(other, PerRun) else other)
        if not isinstance(answers, Tensor):  # compared with something that is no number
            return bool(answers)
        first = bool(answers.flatten()[0])
        if bool((answers != first).any()):
            self._refuse("decides for all runs at once by numbers that do not agree")
        return first

    def _refuse(self, what: str) -> NoReturn:
        """Raise `InputError`, naming the line that asked."""
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_code.co_filename == __file__:
            frame = frame.f_back
        where = f"{frame.f_code.co_qualname} ({Path(frame.f_code.co_filename).name}, line {frame.f_lineno})"
        raise InputError(f"{where} {what}, so that these runs cannot go side by side; call `fit` for each")


def at_least(low: float, value: Any) -> Any:
    """The value, or `low` where it is below that: for each run its own."""
    return PerRun(value.values.clamp(min=low)) if isinstance(value, PerRun) else max(value, low)
