"""How often a step waits for the device: what a GPU computes is not read before a pass is over."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bilevel import LISA, ScaleBiO
from bilevel.testing.session import Session
from bilevel_backends.torch_backend import TorchBackend
from bilevel_llm.reweighting.problem import LLMReweighting

READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}
"""What `item`, `float`, `if` and choosing by a mask come to."""


class Reads(TorchDispatchMode):
    """Counts the operations after which the host waits for values."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in READS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("micro_batch_size", [None, 5])
def test_a_step_reads_a_loss_a_pass_and_a_norm_a_variable(
    problem: Callable[..., LLMReweighting], micro_batch_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = 0

    def tolist(tensor: Tensor, original: Callable[[Tensor], Any] = Tensor.tolist) -> Any:
        nonlocal listed
        listed += 1
        return original(tensor)

    backend = TorchBackend(device="cpu", micro_batch_size=micro_batch_size)
    reweighting = problem()
    reweighting.packed = True  # as `examine` finds; transformers reads the positions of padded rows itself, once a pass
    with Session(reweighting, ScaleBiO(warmup=0), backend, active=LISA(blocks=1)) as session:
        session.step(2)
        monkeypatch.setattr(Tensor, "tolist", tolist)
        with Reads() as reads:
            session.step()
    assert listed == 3  # g(z), g(y) and f(y), with their parts
    assert reads.count == 3  # the norms of z, y and x
