"""Which tokens a model can take: how many it knows, how many places it has learned, and where places begin to shift."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from bilevel import InputError
from bilevel_llm.data.tokens import TokenTable

FOLLOWS_LENGTH = ("dynamic", "longrope", "su")
"""Kinds of RoPE whose frequencies change with the length of the padded batch, once that is above a limit."""


def check_limits(model: Any, tables: Mapping[str, TokenTable]) -> None:
    """Raise `InputError` for a row that the model cannot take: before the first step, which would fail deep inside.

    model: a causal LM; its parameters may be on the meta device.
    tables: what they are called in messages -> rows.
    """
    known = model.get_input_embeddings().num_embeddings
    places = learned_positions(model)
    for name, table in tables.items():
        largest = int(table.ids.max(initial=0))
        if largest >= known:
            row = int(np.searchsorted(table.starts, int(table.ids.argmax()), side="right")) - 1
            raise InputError(
                f"{table.where(row)} ({name}): the tokenizer writes token {largest}, and the model's embedding has {known} "
                "tokens; use the tokenizer that belongs to the model, or enlarge the model's embedding"
            )
        longest = int(table.lengths.max(initial=0))
        if places is not None and longest > places:
            raise InputError(
                f"{table.where(int(table.lengths.argmax()))} ({name}): the row has {longest} tokens, and the model has "
                f"learned {places} positions; set max_length to {places} or less"
            )
        for kind, limit in _changing_rope(model.config):
            if longest > limit:
                raise InputError(
                    f"{table.where(int(table.lengths.argmax()))} ({name}): the row has {longest} tokens, and above {limit} "
                    f"the rotary positions of this model ({kind}) change with the longest row of a batch, so that a short "
                    f"row's loss would depend on its neighbors; set max_length to {limit} or less"
                )


def learned_positions(model: Any) -> int | None:
    """The longest row that a model with an embedding of positions can take; None if it computes positions."""
    words = model.get_input_embeddings()
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and module is not words and (last == "wpe" or "position" in last):
            first = getattr(module, "offset", 0 if module.padding_idx is None else module.padding_idx + 1)
            return module.num_embeddings - int(first)
    return None


def _changing_rope(config: Any) -> list[tuple[str, int]]:
    """The kinds of RoPE that follow the length of the batch, each with the length up to which they do not."""
    text = config.get_text_config()
    given = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    settings: Sequence[Any] = [given, *given.values()]  # by kind of layer, in some models
    found = []
    for setting in settings:
        kind = (setting.get("rope_type") or setting.get("type")) if isinstance(setting, Mapping) else None
        if kind in FOLLOWS_LENGTH:
            names = ("original_max_position_embeddings", "max_position_embeddings")
            limits = [setting.get(names[0]), *(getattr(text, name, None) for name in names)]
            found.append((str(kind), min(int(limit) for limit in limits if limit)))
    return found
