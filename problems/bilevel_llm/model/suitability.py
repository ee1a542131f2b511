"""Whether a language model is what the losses assume: a row's loss depends on that row alone, a token's on what precedes it.

What a model declares is read from its configuration (`limits`). The rest is measured here: four forward passes of a few
tokens tell how much logits move with tokens that must not matter, and two more whether they are the same in packed rows.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from bilevel import Forward, InputError
from bilevel_llm.data.packing import Packing

log = logging.getLogger("bilevel.llm")

SEEN, LENGTH = 8, 24
"""Tokens that are watched, and those of the rows that they stand in."""


@dataclass(frozen=True)
class Probe:
    """Batches in which the first tokens of the first row are the same.

    base: Shape: (2, length). later: other tokens follow. beside: another second row. Shapes as base.
    alone: these tokens, and nothing else. Shape: (1, SEEN).
    """

    base: Tensor
    later: Tensor
    beside: Tensor
    alone: Tensor

    @classmethod
    def of(cls, tokenizer: Any, length: int = LENGTH) -> Probe:
        """Tokens drawn from those that are not special (which some models read as padding), always the same.

        length: tokens of a row, more than SEEN.
        """
        special = set(tokenizer.all_special_ids)
        ordinary = torch.tensor([token for token in sorted(tokenizer.get_vocab().values()) if token not in special] or [0])
        draw = torch.Generator().manual_seed(0)
        base, others = ordinary[torch.randint(len(ordinary), (2, 2, length), generator=draw)]
        later, beside = base.clone(), base.clone()
        later[0, SEEN:], beside[1] = others[0, SEEN:], others[1]
        return cls(base, later, beside, base[:1, :SEEN].clone())


def probe(model: Forward, batch: Probe) -> dict[str, Tensor]:
    """How far each kind of tokens that must not matter moves the logits, as a multiple of what rounding can explain.

    Distances are in standard deviations of the logits over the vocabulary. In float32, every causal family of transformers
    that was tried stays below 2e-6, and every other one is above 5e-3: the limit is 1e-3, at any place. A number in bfloat16
    is rounded by up to 4e-3 of itself, and experts may be chosen differently for it: there the limit is 0.01 for the median
    of the places and 0.1 at any, and five times that for the row without padding, whose shape may have kernels of its own.
    """
    places = torch.arange(SEEN, device=batch.base.device)
    base = model(batch.base, places)

    def moved(ids: Tensor, slack: float) -> Tensor:
        return _distance(base, model(ids, places), slack)

    found = {"later": moved(batch.later, 1), "beside": moved(batch.beside, 1), "padding": moved(batch.alone, 5)}
    odd = torch.stack([base.isfinite().all().logical_not().double(), *(~torch.isfinite(v) for v in found.values())]).amax()
    return {**{name: torch.nan_to_num(value, 0.0, 0.0) for name, value in found.items()}, "odd": odd}


def _distance(base: Tensor, other: Tensor, slack: float) -> Tensor:
    """How far logits have moved, as a multiple of what rounding can explain; see `probe`."""
    scale = base.float().std(-1).mean().clamp_min(torch.finfo(torch.float32).tiny)
    distances: Tensor = (other.double() - base.double()).abs().amax(-1) / scale
    if base.dtype in (torch.float32, torch.float64):
        return distances.amax() / 1e-3
    return torch.maximum(distances.median() / 0.01, distances.amax() / 0.1) / slack


def probe_packed(model: Forward, batch: Probe) -> dict[str, Tensor]:
    """How far logits move when rows are packed, as `probe` measures it.

    The rows differ in length and two of them begin alike, so that a model that ignores positions, mixes rows in any layer,
    or knows nothing of packed rows is found. A model that fails with them is infinitely far (1e9, for numbers are finite).
    """
    first, second = batch.base
    half = torch.cat([first[: SEEN // 2], second[SEEN // 2 :]])
    ids = torch.stack([second, first, half])
    length = ids.shape[1]
    positions = torch.cat([torch.arange(SEEN), length + torch.arange(length - 1), 2 * length + torch.arange(2 * SEEN)])
    packing = Packing.of(ids.cpu(), positions).to(ids.device)
    positions = positions.to(ids.device)
    base = model(ids, positions)
    try:
        moved = _distance(base, model(ids, positions, packing), 5)
    except Exception as error:  # whatever a model raises that does not expect such input
        log.debug("packed rows: %r", error)
        moved = base.new_tensor(torch.inf)
    return {"packed": torch.nan_to_num(moved.double(), 1e9, 1e9).clamp_max(1e9)}


def can_be_packed(found: Mapping[str, float]) -> bool:
    """Whether `probe_packed` has found the same logits. If not, the log says that rows are padded."""
    same = found["packed"] <= 1
    if not same:
        log.info("rows are padded: this model's layers, or its attention, cannot take packed rows")
    return same


def examine(model: nn.Module, tokenizer: Any) -> bool:
    """Whether rows can be packed for a `LanguageModel` that is whole on one device.

    Raises `InputError` if the model is not suitable; see above.
    """
    device = next(model.parameters()).device
    batch = Probe.of(tokenizer)
    batch = Probe(*(getattr(batch, field.name).to(device) for field in fields(batch)))
    with torch.no_grad():
        found, packed = probe(model, batch), probe_packed(model, batch)
    require_independent({name: float(value) for name, value in found.items()})
    return can_be_packed({name: float(value) for name, value in packed.items()})


def require_independent(found: Mapping[str, float]) -> None:
    """Raise `InputError` if `probe` has found a dependence that must not be."""
    if found["odd"]:
        raise InputError("problem.model: the model's logits are not finite; its weights are damaged, or not numbers")
    if found["later"] > 1:
        raise InputError(
            "problem.model: the model is not causal: its prediction changes with the tokens that come after, so that it "
            "would see what it is to predict. Use a decoder (for BERT and its kin: is_decoder: true in config.json, with "
            "weights trained in that way)"
        )
    if found["beside"] > 1:
        raise InputError(
            "problem.model: the model mixes the rows of a batch: its prediction for one row changes with the row beside it, "
            "so that no row has a loss of its own; use another model"
        )
    if found["padding"] > 1:
        raise InputError(
            "problem.model: the model's prediction changes when a row is padded to the length of a longer one, so that its "
            "loss depends on its neighbors; use another model, or positions that do not follow the length of the batch"
        )
