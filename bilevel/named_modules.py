"""A variable of several parts, each of which a loss calls by its name."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from bilevel.errors import ProblemError
from bilevel.suggest import did_you_mean
from bilevel.tensor_module import TensorModule


class NamedModules(nn.ModuleDict):
    """Modules by name. A call names one, and passes the other arguments to it: y("head", features).

    All of them are one variable: they step together, and a sharded backend gathers them as it does the parts of one module.

    parts: a module for each name, or a tensor, which becomes one (`TensorModule`).
    """

    def __init__(self, parts: Mapping[str, nn.Module | Tensor]) -> None:
        super().__init__({name: TensorModule(part) if isinstance(part, Tensor) else part for name, part in parts.items()})

    def forward(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """The forward of the module of that name. Raises `ProblemError`, with the names that there are, for another one."""
        if name not in self:
            raise ProblemError(f"a loss calls {name!r}, which is no part of the variable{did_you_mean(name, self)}")
        return self[name](*args, **kwargs)
