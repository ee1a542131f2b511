"""Losses of tokens are exact to rounding; their gradients are those of cross-entropy."""

import pytest
import torch
import torch.nn.functional as F

from bilevel_llm.model import token_losses as module
from bilevel_llm.model.token_losses import token_losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_losses_over_a_large_vocabulary_are_exact(dtype: torch.dtype) -> None:
    """Torch's own are off by 1e-5 here, and by -2e-6 on average: the penalty would multiply that."""
    torch.manual_seed(0)
    logits, targets = (3 * torch.randn(60, 49_152)).to(dtype), torch.randint(0, 49_152, (60,))
    losses = token_losses(logits, targets)
    assert losses.dtype == torch.float32
    error = losses.double() - F.cross_entropy(logits.double(), targets, reduction="none")
    assert error.abs().max() <= 2e-6
    assert abs(error.mean()) <= 2e-7


def test_the_gradient_is_that_of_cross_entropy_in_chunks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_ON_CPU", 20)  # three rows, three rows, one
    logits = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    targets, weights = torch.arange(7) % 6, torch.linspace(-1, 2, 7, dtype=torch.float64)
    (found,) = torch.autograd.grad(weights @ token_losses(logits, targets), logits)
    (wanted,) = torch.autograd.grad(weights @ F.cross_entropy(logits, targets, reduction="none"), logits)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-15)


def test_the_losses_can_be_differentiated_twice() -> None:
    logits, targets = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.tensor([0, 3, 1])
    assert torch.autograd.gradgradcheck(lambda logits: token_losses(logits, targets), logits)


def test_nothing_to_predict_has_no_loss() -> None:
    assert token_losses(torch.zeros(0, 7), torch.zeros(0, dtype=torch.long)).shape == (0,)
