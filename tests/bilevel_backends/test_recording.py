from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from bilevel_backends.recording import NotRecordable, record


def gradient(x: Tensor, y: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    value = (torch.tanh(x) @ torch.ones(3, 3).tril() * y).sum()
    return [value.detach(), *torch.autograd.grad(value, x)]


def test_a_recorded_function_takes_other_arguments() -> None:
    repeat, first = record(gradient, [torch.ones(3), torch.ones(3)])
    torch.testing.assert_close(list(first), gradient(torch.ones(3), torch.ones(3)))
    x, y = torch.randn(3), torch.randn(3)
    torch.testing.assert_close(list(repeat(x, y)), gradient(x, y))


def test_two_arguments_that_are_one_tensor_are_told_apart() -> None:
    same = torch.ones(3)
    repeat, _ = record(gradient, [same, same])
    x, y = torch.randn(3), torch.randn(3)
    torch.testing.assert_close(list(repeat(x, y)), gradient(x, y))


def test_constants_are_read_when_the_function_is_called() -> None:
    constant = torch.zeros(3)
    repeat, _ = record(lambda x: [x + constant], [torch.ones(3)])
    constant += 5
    assert repeat(torch.ones(3))[0].tolist() == [6.0] * 3


def test_what_is_changed_in_place_is_made_anew_at_every_call() -> None:
    def count(x: Tensor) -> Sequence[Tensor]:
        total = torch.zeros(2)
        total.index_add_(0, torch.tensor([0, 1, 1]), x)
        view = total.view(2, 1)
        view.add_(1)
        return [total]

    repeat, _ = record(count, [torch.ones(3)])
    for _ in range(2):
        assert repeat(torch.ones(3))[0].tolist() == [2.0, 3.0]


def test_a_function_that_changes_its_argument_or_reads_values_is_refused() -> None:
    for function in (lambda x: [x.mul_(2)], lambda x: [x * x.sum().item()]):
        with pytest.raises(NotRecordable):
            record(function, [torch.ones(3)])
