"""How often a step waits for the device: what a GPU computes is not read before a pass is over."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bilevel import LISA, Descent, ScaleBiO, Shard
from bilevel.testing.session import Session
from bilevel_backends.module_backend import to_device
from bilevel_backends.torch_backend import TorchBackend
from bilevel_llm.finetuning.problem import FineTuning
from bilevel_llm.model.lora import LoRA
from bilevel_llm.problem import LanguageModelProblem
from bilevel_llm.reweighting.granularity import PerSample, PerScorer
from bilevel_llm.reweighting.problem import LLMReweighting
from tests.bilevel_llm.tiny import FAMILIES

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


class NoCopies(TorchDispatchMode):
    """Refuses what copies a tensor of the host to the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        copied = func is torch.ops.aten._to_copy.default and args[0].device.type == "cpu" and out.device.type != "cpu"
        assert not copied, "a tensor of the host was copied to the device"
        return out


@contextmanager
def nothing_listed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """The tensors that `tolist` is called for."""
    listed: list[Tensor] = []

    def tolist(tensor: Tensor, original: Callable[[Tensor], Any] = Tensor.tolist) -> Any:
        listed.append(tensor)
        return original(tensor)

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "tolist", tolist)
        yield listed


@pytest.mark.parametrize("micro_batch_size", [None, 4])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("solver", "waits"),
    [
        (ScaleBiO(warmup=0), 3 + 3),  # g(z), g(y) and f(y), with their parts; z, y and x
        (Descent(lr=0.1), 1 + 1),
    ],
    ids=["reweighting", "fine-tuning"],
)
def test_a_step_reads_a_loss_a_pass_and_a_norm_a_variable(
    problem: Callable[..., LLMReweighting],
    tuning: Callable[..., FineTuning],
    solver: Any,
    waits: int,
    packed: bool,
    micro_batch_size: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: LanguageModelProblem = tuning() if isinstance(solver, Descent) else problem()
    made.packed = packed
    backend = TorchBackend(device="cpu", micro_batch_size=micro_batch_size)
    with Session(made, solver, backend, active=LISA(blocks=1)) as session:
        session.step(2)
        with nothing_listed(monkeypatch) as listed, Reads() as reads:
            session.step()
    assert len(listed) + reads.count == waits


def require_no_waiting(
    made: LanguageModelProblem,
    device: torch.device = torch.device("meta"),  # noqa: B008
    watched: Callable[[], AbstractContextManager[Any]] = NoCopies,
) -> None:
    """Take passes of both losses, by default on the meta device, where reading a value is an error.

    watched: makes the context of a pass, in which waiting is an error.
    """
    x, y = made.upper().to(device), made.lower().to(device)
    for packed in {False, bool(y.can_pack)}:
        made.packed = packed
        for loss, draw in ((made.lower_loss, made.lower_batch), (made.upper_loss, made.upper_batch)):
            first, second = to_device(list(draw(0, Shard(micro_batch_size=5))), device)[:2]
            loss(x, y, first)  # constants are copied once
            with watched():
                value: Any = loss(x, y, second)
                (value[0] if isinstance(value, tuple) else value).backward()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_waits_for_nothing(problem: Callable[..., LLMReweighting], family: str) -> None:
    require_no_waiting(problem(family))


@pytest.mark.parametrize("settings", [{"granularity": PerSample()}, {"granularity": PerScorer(features="length")}], ids=str)
def test_weights_of_rows_and_a_prior_wait_for_nothing(
    problem: Callable[..., LLMReweighting], settings: dict[str, Any]
) -> None:
    require_no_waiting(problem(prior_strength=0.1, **settings))


def test_fine_tuning_waits_for_nothing(tuning: Callable[..., FineTuning]) -> None:
    require_no_waiting(tuning(lora=LoRA(rank=2), mean_over="tokens"))
