"""One micro-batch of language-model rows without values, for planning."""

import math

import torch
from torch import Tensor, nn

from bilevel_llm.model.token_losses import token_losses


def full_loss(module: nn.Module, rows: int, *, length: int, sources: int, labelled_share: float) -> Tensor:
    """The loss of a micro-batch, on the meta device: every row is full, and the labels are spread evenly over the rows.

    module: a `LanguageModel`. length: tokens of a row. labelled_share: part of the tokens that are predicted; the logits
    exist for these alone.
    """
    targets = max(1, math.ceil(rows * length * labelled_share))
    ids = torch.empty(rows, length, dtype=torch.int64, device="meta")
    losses = token_losses(module(ids, ids.flatten()[:targets]), ids.flatten()[:targets])
    weights = torch.empty(sources, targets, device="meta")
    return (weights.double() @ losses.double()).sum()


def planned_attention(attention: str | None) -> str | None:
    """The implementation to plan with. Fused kernels of packages that only a GPU machine has take what torch's own does."""
    return "sdpa" if attention is not None and attention.startswith("flash_attention") else attention
