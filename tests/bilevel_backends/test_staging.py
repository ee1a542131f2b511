from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bilevel_backends.staging import Staging


def mixed() -> list[torch.Tensor]:
    return [
        torch.tensor([True, False, True]),
        torch.randn(5, dtype=torch.bfloat16),
        torch.randn(3, 2).T,
        torch.empty(0),
        torch.randn(7, dtype=torch.float64),
        torch.tensor(3.0),
    ]


def test_copies_are_as_the_tensors_were_and_their_memory_is_used_again() -> None:
    staging, tensors = Staging(torch.device("cpu")), mixed()
    before = [tensor.clone() for tensor in tensors]
    copies = staging.copy(tensors)
    for tensor in tensors:
        tensor.zero_()
    assert all(torch.equal(copy, then) and copy.dtype == then.dtype for copy, then in zip(copies, before, strict=True))
    size, place = staging.bytes, copies[4].untyped_storage().data_ptr()
    assert size == sum(tensor.nbytes for tensor in tensors)
    again = staging.copy(mixed()[1:])
    assert again[0].untyped_storage().data_ptr() == place
    assert staging.bytes == size
    assert len(staging.copy([torch.randn(100)])) == 1
    assert staging.bytes == 400


@pytest.mark.parametrize("refused", [0, 1])
def test_on_a_gpu_the_memory_is_locked_until_it_is_freed_where_the_system_allows_it(
    monkeypatch: pytest.MonkeyPatch, refused: int
) -> None:
    calls: list[tuple[Any, ...]] = []
    runtime = SimpleNamespace(
        cudaHostRegister=lambda place, size, flags: calls.append(("lock", place, size)) or refused,  # type: ignore[func-returns-value]
        cudaHostUnregister=lambda place: calls.append(("unlock", place)),
    )
    monkeypatch.setattr("bilevel_backends.staging._runtime", lambda: runtime)
    waits = SimpleNamespace(synchronize=lambda: calls.append(("wait",)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: waits)
    staging = Staging(torch.device("cuda"))
    first = staging.copy([torch.ones(4)])[0].data_ptr()
    staging.copy([torch.ones(2)])
    second = staging.copy([torch.ones(8)])[0].data_ptr()
    staging.free()
    staging.free()
    locks = [
        ("lock", first, 16),
        ("wait",),
        ("wait",),
        ("unlock", first),
        ("lock", second, 32),
        ("wait",),
        ("unlock", second),
    ]
    assert calls == [call for call in locks if not refused or call[0] != "unlock"]
