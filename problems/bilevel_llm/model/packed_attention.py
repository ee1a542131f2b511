"""Attention that sees whole rows, in a model that computes every distinct token once.

All other layers of a transformer treat tokens one by one. They are given the tokens of a `Packing`, as one row without
padding; attention alone spreads them over the places of the rows, does there what torch's own attention does, and collects
the results. It is registered with transformers under a name of its own, beside a function that builds the rows' masks.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bilevel_llm.data.packing import Packing
from bilevel_llm.model.cpu_attention import grouped_attention, serves

NAME = "packed_sdpa"
"""What transformers calls it. Without a packing it does what `sdpa` does."""


@dataclass(frozen=True)
class Rows:
    """The places of the rows, in which attention sees the tokens.

    token: the token at every place. Shape: (rows, length).
    owner: for every token one of its places, in the flattened (rows * length). Shape: (tokens,).
    """

    token: Tensor
    owner: Tensor

    @classmethod
    def of(cls, packing: Packing) -> Rows:
        """The rows of a packing."""
        return cls(packing.token, packing.row * packing.token.shape[1] + packing.place)

    def spread(self, states: Tensor) -> Tensor:
        """From tokens to places. Shapes: (1, heads, tokens, size) -> (rows, heads, length, size)."""
        by_token = states.squeeze(0).transpose(0, 1)
        places = by_token.flatten(1).index_select(0, self.token.flatten())
        return places.view(*self.token.shape, *by_token.shape[1:]).transpose(1, 2)

    def collect(self, states: Tensor) -> Tensor:
        """From places to tokens. Shapes: (rows, length, heads, size) -> (1, tokens, heads, size)."""
        return states.flatten(0, 1).index_select(0, self.owner).unsqueeze(0)


_masked: ContextVar[Mapping[str, Any] | None] = ContextVar("what the running pass's masks are made for", default=None)


def use_packed_attention(model: Any) -> bool:
    """Let a causal LM of transformers use the packed attention, if it can be asked to. Returns whether it does.

    Whether it then computes the right thing is another question; see `suitability`.
    """
    if _attention(model) == "sdpa":
        _register()
        forward = (model.get_base_model() if hasattr(model, "get_base_model") else model).forward
        if model._can_set_attn_implementation() and "position_ids" in inspect.signature(forward).parameters:
            model.set_attn_implementation(NAME)
    return _attention(model) == NAME


@contextmanager
def packed_inputs(ids: Tensor, packing: Packing) -> Iterator[dict[str, Any]]:
    """What to call a model with, within this context, to compute the tokens of a packing of these rows.

    The rows travel with the arguments to the attention, so that layers that are recomputed in the backward pass have them.
    """
    rows = Rows.of(packing)
    ids = ids[packing.row, packing.place].unsqueeze(0)
    length = rows.token.shape[1]
    with _made_for(batch_size=1, q_length=length, kv_length=length):
        yield {
            "input_ids": ids,
            "position_ids": packing.place.unsqueeze(0),
            "attention_mask": torch.ones_like(ids),
            "packed_rows": rows,
        }


@contextmanager
def padded_inputs(model: Any, ids: Tensor) -> Iterator[dict[str, Tensor]]:
    """What to call a model with, within this context, to compute every place of rows that are padded on the right.

    Such rows need no mask. Without one, transformers looks through the positions for sequences, and with one for padding:
    either way the host waits until the device has done all that it was given. A mask of ones, which is dropped where the
    masks of layers are made, spares both. So does one for `eager`, whose masks are always made in full.
    """
    with _made_for():
        yield {
            "input_ids": ids,
            **({"attention_mask": torch.ones_like(ids)} if _attention(model) in (NAME, "eager") else {}),
        }


@contextmanager
def _made_for(**form: int) -> Iterator[None]:
    """Within this context, the masks of layers are made for rows without padding, and of this form."""
    running = _masked.set({**form, "attention_mask": None})
    try:
        yield
    finally:
        _masked.reset(running)


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _mask)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_rows: Rows | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Shapes: (rows, heads, length, size), with 1 row of all tokens where they are packed -> (rows, length, heads, size)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if packed_rows is not None:
        query, key, value = map(packed_rows.spread, (query, key, value))
    if serves(module, query, key, attention_mask, settings):
        output = grouped_attention(query, key, value, attention_mask, settings.get("scaling"))
    else:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    return (output if packed_rows is None else packed_rows.collect(output)), None


def _mask(*args: Any, **settings: Any) -> Tensor | None:
    """The mask of the rows: what a row of that length has, without padding, in this kind of layer."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    mask: Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, **{**settings, **(_masked.get() or {})})
    return mask


def _attention(model: Any) -> str | None:
    """The name of the attention implementation that a model uses."""
    return getattr(getattr(model, "config", None), "_attn_implementation", None)
