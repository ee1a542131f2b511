"""Causal attention for bfloat16 on a CPU: torch's fused kernel spends most of its time in a slow backward pass there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

LONGEST = 256
"""The longest rows that it serves: it keeps the probabilities, whose memory grows with the square of the length."""

_OTHER = ("dropout", "softcap", "position_bias", "is_causal", "cache", "output_attentions")


def serves(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, settings: Mapping[str, Any]) -> bool:
    """Whether `grouped_attention` computes what an attention function of transformers is asked for, and quicker than torch.

    It is not asked for rows with a padding of their own, nor for new tokens after ones that are known.
    """
    quicker = query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.shape[2] <= LONGEST
    whole = query.shape[2] == key.shape[2] and (mask is None or (len(mask) == 1 and mask.dtype == torch.bool))
    return quicker and whole and getattr(module, "is_causal", True) and not any(settings.get(name) for name in _OTHER)


def grouped_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """Attention in float32, with one matrix product for all the query heads that share a key head.

    query, key, value: Shape: (rows, heads, length, size); there may be fewer heads of keys and values. mask: where a query
    sees a key, shape (1, 1, length, length); None for what precedes it. scaling: of the scores; None takes the root
    of the size. Returns: (rows, length, heads, size of the values), in the precision of the query.
    """
    rows, heads, length, size = query.shape
    shared = key.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).tril() if mask is None else mask.unsqueeze(2)
    grouped = query.float().reshape(rows * shared, -1, size) * (size**-0.5 if scaling is None else scaling)
    scores = torch.bmm(grouped, key.float().reshape(rows * shared, length, size).transpose(1, 2))
    scores = scores.view(rows, shared, -1, length, length).masked_fill(~mask, -torch.inf)
    probabilities = scores.softmax(-1).view(rows * shared, -1, length)
    output = torch.bmm(probabilities, value.float().reshape(rows * shared, length, -1))
    return output.to(query.dtype).view(rows, heads, length, -1).transpose(1, 2)
