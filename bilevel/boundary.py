"""The boundary between the package and a problem that somebody wrote: what its methods are given, and what they return."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from torch import Tensor, nn

from bilevel.errors import ProblemError
from bilevel.named_modules import NamedModules
from bilevel.tensor_module import TensorModule


class Evaluated:
    """A variable that knows at which of the problem's losses it was last the lower variable.

    A solver hands a backend closures, from which it could not tell. It needs to: a regularizer is a part of the lower loss
    alone, and whoever reads that a loss is infinite wants to know which.
    """

    last_loss: str = ""
    """"upper_loss", "lower_loss", or "" since a backend has cleared it."""


class CallOnly:
    """A variable as a loss sees it: it can be called, and whatever else is asked of it is a `ProblemError`.

    A backend's variables and torch's modules have attributes, which a loss must not find: parameters may be shards, and an
    attribute of ours may have the name of one of the module's.
    """

    __slots__ = ("_forward", "_name")

    def __init__(self, forward: Callable[..., Any], name: str) -> None:
        object.__setattr__(self, "_forward", forward)
        object.__setattr__(self, "_name", name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's forward pass."""
        return object.__getattribute__(self, "_forward")(*args, **kwargs)

    def __getattribute__(self, attribute: str) -> Any:
        if attribute == "__class__":  # for isinstance
            return CallOnly
        if attribute == "__torch_function__":  # by which torch's functions are refused
            return object.__getattribute__(self, attribute)
        if attribute.startswith("__") and attribute.endswith("__"):  # other protocols: it has none
            raise AttributeError(attribute)
        _refuse(self, f".{attribute}")

    def __setattr__(self, attribute: str, value: Any) -> NoReturn:
        _refuse(self, f".{attribute} = ...")

    def __delattr__(self, attribute: str) -> NoReturn:
        _refuse(self, f".{attribute}")

    def __repr__(self) -> str:
        return f"<the variable {object.__getattribute__(self, '_name')}, which can only be called>"

    __hash__ = object.__hash__

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        given = [*args, *(kwargs or {}).values()]
        given += [entry for value in given if isinstance(value, list | tuple) for entry in value]
        _refuse(next(value for value in given if isinstance(value, cls)), f" in torch's {func.__name__}")


def _refuse(variable: CallOnly, use: str) -> NoReturn:
    name = object.__getattribute__(variable, "_name")
    raise ProblemError(
        f"a loss uses {name}{use}, but a variable can only be called, as in {name}(...): its parameters may be shards. "
        "Let the module's forward compute and return what the loss needs"
    )


def _refusing(operation: str) -> Callable[..., NoReturn]:
    def refuse(self: CallOnly, *_: Any) -> NoReturn:
        _refuse(self, f" in {operation}")

    return refuse


_OPERATIONS = (
    "add sub mul matmul truediv floordiv mod divmod pow lshift rshift and xor or radd rsub rmul rmatmul rtruediv rfloordiv "
    "rmod rdivmod rpow rlshift rrshift rand rxor ror neg pos abs invert eq ne lt le gt ge bool len iter next reversed "
    "contains getitem setitem delitem int float complex index round enter exit"
)
for _operation in _OPERATIONS.split():
    setattr(CallOnly, f"__{_operation}__", _refusing(f"the operation {_operation!r}"))


def guard(cls: type) -> None:
    """Let the methods that a subclass of `Problem` defines see and return what they are meant to.

    Losses and the summary see variables that can only be called. What losses, modules and batches are is checked as soon as
    they are returned, so that a mistake is named where it was made. A tensor that `upper` or `lower` returns becomes a
    module that holds it, and named modules and tensors become one module, so that nobody else has to know of them. Raises
    `ProblemError`, when the methods are called.
    """
    for name, (sees, check) in _METHODS.items():
        method = cls.__dict__.get(name)
        if inspect.isfunction(method):
            setattr(cls, name, _guarded(name, method, sees, check))


def _guarded(
    name: str, method: Callable[..., Any], sees: Sequence[str], check: Callable[[Any], str | None]
) -> Callable[..., Any]:
    @functools.wraps(method)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        if sees:
            lower = args[1] if len(args) > 1 else kwargs.get("y")
            if isinstance(lower, Evaluated):
                lower.last_loss = name
            args = (*map(_seen, args, sees), *args[len(sees) :])
            kwargs = {key: _seen(value, key) if key in sees else value for key, value in kwargs.items()} if kwargs else {}
        returned = method(self, *args, **kwargs)
        if (wrong := check(returned)) is not None:
            raise ProblemError(f"{type(self).__name__}.{name} returned {wrong}")
        return _as_module(returned) if check is _module else returned

    return guarded


def _as_module(returned: Any) -> nn.Module:
    if isinstance(returned, Tensor):
        return TensorModule(returned)
    if isinstance(returned, Mapping) or type(returned) is nn.ModuleDict:
        return NamedModules(dict(returned.items()))
    module: nn.Module = returned
    return module


def _seen(variable: Any, name: str) -> Any:
    return variable if type(variable) is CallOnly or not callable(variable) else CallOnly(variable, name)


def _loss(returned: Any) -> str | None:
    value, parts = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, None)
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim():
        return f"{_described(value)}; return a scalar tensor of floating-point numbers"
    return None if value is returned else _parts(parts)


def _parts(parts: Any) -> str | None:
    if isinstance(parts, Mapping) and all(isinstance(part, Tensor) and not part.dim() for part in parts.values()):
        return None
    return f"{_described(parts)} with the loss; return a mapping from the names of parts to scalar tensors"


def _module(returned: Any) -> str | None:
    parts = returned.items() if isinstance(returned, Mapping) else [("", returned)]
    odd = [(name, part) for name, part in parts if not _is_variable(part)]
    if parts and not odd:
        return None
    what = f"{_described(odd[0][1])} as its part {odd[0][0]!r}" if odd and odd[0][0] else _described(returned)
    return (
        f"{what}; return a torch.nn.Module, whose forward gives a loss what it needs, or a tensor of floating-point "
        "numbers, or a mapping from names to these"
    )


def _is_variable(part: Any) -> bool:
    return isinstance(part, nn.Module) or (isinstance(part, Tensor) and part.is_floating_point())


def _batch(returned: Any) -> str | None:
    if isinstance(returned, Sequence) and not isinstance(returned, str | bytes) and not hasattr(returned, "_fields"):
        return None
    return f"{_described(returned)}; return the list of this process's micro-batches"


def _summary(returned: Any) -> str | None:
    if not isinstance(returned, Mapping):
        return f"{_described(returned)}; return a mapping from names to numbers"
    for key, value in returned.items():
        number = isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)
        if not number:
            return f"{_described(value)} as {key!r}; return one number for each name"
    return None


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and type {value.dtype}"
    return "None" if value is None else f"a value of the type {type(value).__qualname__}"


_METHODS: Mapping[str, tuple[Sequence[str], Callable[[Any], str | None]]] = {
    "upper": ((), _module),
    "lower": ((), _module),
    "upper_loss": (("x", "y"), _loss),
    "lower_loss": (("x", "y"), _loss),
    "upper_batch": ((), _batch),
    "lower_batch": ((), _batch),
    "summary": (("x",), _summary),
}
"""Method -> the names of the variables that it is given first, and what says what is wrong with what it returns."""
