"""Attention in bfloat16 on a CPU is torch's own, and closer to the exact one."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bilevel_llm.model.cpu_attention import grouped_attention

CAUSAL = torch.ones(1, 1, 12, 12).tril().bool()
MASKS = {"causal": None, "window": CAUSAL & CAUSAL.logical_not().roll(5, 2).logical_or(torch.eye(12).bool())}


def outcome(inputs: list[Tensor], mask: Tensor | None, *, ours: bool) -> list[Tensor]:
    """The output, and the gradients of queries, keys and values."""
    inputs = [one.detach().requires_grad_(True) for one in inputs]
    if ours:
        output = grouped_attention(*inputs, mask, 0.3).transpose(1, 2)
    else:
        output = F.scaled_dot_product_attention(*inputs, attn_mask=mask, is_causal=mask is None, scale=0.3, enable_gqa=True)
    weights = torch.linspace(-1, 1, output.numel()).view(output.shape).to(output)
    return [output.detach(), *torch.autograd.grad((weights * output).sum(), inputs)]


@pytest.mark.parametrize("kind", MASKS)
def test_attention_is_torchs_own(kind: str) -> None:
    torch.manual_seed(0)
    exact = [torch.randn(2, 12, heads, 8).transpose(1, 2) for heads in (6, 2, 2)]
    for found, wanted in zip(outcome(exact, MASKS[kind], ours=True), outcome(exact, MASKS[kind], ours=False), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)


def test_in_bfloat16_it_is_no_further_from_the_exact_one() -> None:
    torch.manual_seed(0)
    low = [torch.randn(2, heads, 64, 16).bfloat16() for heads in (6, 2, 2)]
    exact = outcome([one.double() for one in low], None, ours=False)
    for ours, torchs, wanted in zip(outcome(low, None, ours=True), outcome(low, None, ours=False), exact, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - wanted).norm() <= (torchs - wanted).norm()
