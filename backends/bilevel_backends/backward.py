"""The backward pass of a loss, by the call that torch's own `Tensor.backward` ends in.

What `Tensor.backward` does before, for tensors of any kind and shape, takes as long as the backward pass of a small problem.
A loss needs none of it: it is one scalar.
"""

from functools import cache

import torch
from torch import Tensor

try:
    from torch.autograd.graph import _engine_run_backward
except ImportError:  # it is private to torch, which may call it something else one day
    _engine_run_backward = None  # type: ignore[assignment]


def run_backward(loss: Tensor) -> None:
    """Accumulate the gradients of a scalar in the leaves that require one."""
    if type(loss) is not Tensor or _engine_run_backward is None:  # a subclass may have a way of its own
        loss.backward()  # type: ignore[no-untyped-call]
        return
    seed = _one(loss.dtype, loss.device)
    _engine_run_backward((loss,), (seed,), False, False, (), allow_unreachable=True, accumulate_grad=True)


@cache
def _one(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.ones((), dtype=dtype, device=device)
