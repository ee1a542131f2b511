"""Record the tensor operations of a function once, and repeat them from then on.

What comes between the operations (the function's own Python code, autograd, `torch.func`) takes much longer than operations
on small tensors do. A repeated function skips it. Unlike torch.compile this takes about as long as a single call.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Tensors = Sequence[Tensor]

SAME = {torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten.lift_fresh.default}
"""Operations that give what they are given, once there is no autograd."""


class NotRecordable(Exception):
    """The function reads the values of tensors, on which its operations may then depend, or changes what it is given."""


def record(function: Callable[..., Tensors], arguments: Tensors) -> tuple[Callable[..., Tensors], Tensors]:
    """A function that repeats the operations of `function` on other arguments of the same form, and its results on these.

    Tensors that are not among the arguments are constants, as they are at the time of a call. Random numbers are drawn anew
    by what draws them with torch, and are constants otherwise. Raises `NotRecordable`.
    """
    arguments = [argument.detach() for argument in arguments]  # an object each, though two may be the same tensor now
    recorder = _Recorder(arguments)
    with recorder:
        results = function(*arguments)
    return recorder.build(results), results


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operation, with a name for every tensor."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: torch would load its compiler, which takes seconds, to keep it from looking at this class."""
        return False

    def __init__(self, arguments: Tensors) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.arguments = [f"a{k}" for k in range(len(arguments))]
        self.names = {id(tensor): f"a{k}" for k, tensor in enumerate(arguments)}
        self.kept: list[Any] = list(arguments)  # an id is that of one tensor only as long as the tensor exists
        self.calls: list[tuple[str, list[str], set[str], bool]] = []  # line, what it gives, what it needs, in place
        self.space: dict[str, Any] = {}
        self.numbers = itertools.count()
        self.constants: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        changes = func._schema.is_mutable
        if not _only_tensors(found) or (changes and self._name(args[0])[0] in "ac"):
            raise NotRecordable(str(func))
        self.kept.append(found)
        if func in SAME:
            self.names[id(found)] = self._name(args[0])
            return found
        needed = {self._name(tensor) for tensor in _tensors((args, kwargs))}
        if needed and needed <= self.constants and not changes:
            for tensor in _tensors(found):
                self._constant(tensor)
            return found
        words = [self._word(value) for value in args]
        words += [f"{key}={self._word(value)}" for key, value in (kwargs or {}).items()]
        gives = [self._name(tensor) if changes else self._new(tensor) for tensor in _tensors(found)]
        target = gives[0] if isinstance(found, Tensor) else f"({''.join(f'{name}, ' for name in gives)})"
        self.space[function := f"f{next(self.numbers)}"] = func
        self.calls.append((f"{target} = {function}({', '.join(words)})", gives, needed, changes))
        return found

    def build(self, results: Tensors) -> Callable[..., Tensors]:
        """A function of the operations on which the results depend."""
        ends = [self._name(tensor) for tensor in results]
        needed, lines = set(ends), []
        for line, gives, needs, changes in reversed(self.calls):
            if changes or needed.intersection(gives):
                needed |= needs
                lines.append(f"    {line}")
        head, end = f"def repeat({', '.join(self.arguments)}):", f"    return [{', '.join(ends)}]"
        source = "\n".join([head, *reversed(lines), end])
        exec(compile(source, "<recorded>", "exec"), self.space)
        repeat: Callable[..., Tensors] = self.space["repeat"]
        return repeat

    def _name(self, tensor: Tensor) -> str:
        return self.names[id(tensor)] if id(tensor) in self.names else self._constant(tensor)

    def _new(self, tensor: Tensor) -> str:
        self.names[id(tensor)] = name = f"t{next(self.numbers)}"
        return name

    def _constant(self, tensor: Tensor) -> str:
        self.kept.append(tensor)
        self.names[id(tensor)] = name = f"c{next(self.numbers)}"
        self.space[name] = tensor.detach()
        self.constants.add(name)
        return name

    def _word(self, value: Any) -> str:
        """The value in the source of the function."""
        if isinstance(value, Tensor):
            return self._name(value)
        if isinstance(value, list | tuple):
            return f"[{', '.join(map(self._word, value))}]"
        if value is None or isinstance(value, bool | int):
            return repr(value)
        self.space[name := f"v{next(self.numbers)}"] = value
        return name


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _only_tensors(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, list | tuple) and all(map(_only_tensors, value)))
