"""The gradient of every single row's loss, many rows at a time."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

from bilevel import InputError
from bilevel_llm.data.padding import as_ids, predicting_places
from bilevel_llm.data.tokens import TokenTable
from bilevel_llm.model.token_losses import token_losses

log = logging.getLogger("bilevel.llm")

How = Literal["auto", "vmap", "loop"]
"""vmap: all rows of a batch at once; loop: one after another, for models that cannot be vectorized; auto: vmap if it works,
or else loop."""


@dataclass(frozen=True)
class RowBatch:
    """Rows whose losses are kept apart. Padding has weight 0.

    ids: padded on the right. Shape: (rows, length).
    positions, targets: the position from which a token is predicted, and that token. Shape: (rows, most targets of a row).
    weights: 1 / (number of the row's targets). Shape: (rows, most targets of a row).
    """

    ids: Tensor
    positions: Tensor
    targets: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return len(self.ids)


def row_batch(table: TokenTable, rows: Sequence[int], device: torch.device) -> RowBatch:
    """The given rows of a table, padded to the longest."""
    data = [table.row(row) for row in rows]
    predicting = [predicting_places(labels) for _, labels in data]
    ids, positions, weights = (
        pad_sequence(parts, batch_first=True)
        for parts in (
            [as_ids(tokens) for tokens, _ in data],
            predicting,
            [torch.full((len(places),), 1 / len(places)) for places in predicting],
        )
    )
    targets = ids.gather(1, positions + 1)
    return RowBatch(ids.to(device), positions.to(device), targets.to(device), weights.to(device))


def row_batches(
    table: TokenTable, rows: Sequence[int], size: int, device: torch.device
) -> Iterator[tuple[list[int], RowBatch]]:
    """Batches of rows of similar length, so that little is padded, each with the numbers of its rows."""
    ordered = sorted(rows, key=lambda row: (len(table.row(row)[0]), row))
    for start in range(0, len(ordered), size):
        part = ordered[start : start + size]
        yield part, row_batch(table, part, device)


class RowGradients:
    """Gradients of the mean token loss of every row.

    model: whole in this process. Its parameters are left as they were and get no `grad`.
    names: the parameters with respect to which the gradients are taken.

    A model that recomputes activations in the backward pass cannot be vectorized.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], how: How = "auto") -> None:
        self.model = model
        self.how = how
        self.parameters: Mapping[str, nn.Parameter] = {name: model.get_parameter(name) for name in names}
        self.size = sum(p.numel() for p in self.parameters.values())

    @property
    def device(self) -> torch.device:
        """Where the parameters are and the gradients will be."""
        return next(iter(self.parameters.values())).device

    def __call__(self, batch: RowBatch) -> Tensor:
        """One gradient per row, with all parameters one after another. Shape: (rows, size), float32."""
        if self.how == "loop":
            return self._loop(batch)
        try:
            return self._vectorized(batch)
        except torch.OutOfMemoryError as error:
            raise InputError(f"out of memory with {len(batch)} rows at a time; lower backend.micro_batch_size") from error
        except (RuntimeError, NotImplementedError, ValueError) as error:
            if self.how == "vmap":
                raise InputError(
                    f"this model cannot be vectorized over rows ({error}); use baseline.gradients=loop"
                ) from error
            log.warning("this model cannot be vectorized over rows; its gradients are taken one by one (%s)", error)
            self.how = "loop"
            return self._loop(batch)

    def _vectorized(self, batch: RowBatch) -> Tensor:
        held = {name: p.detach() for name, p in self.parameters.items()}

        def loss(
            parameters: Mapping[str, Tensor], ids: Tensor, positions: Tensor, targets: Tensor, weights: Tensor
        ) -> Tensor:
            logits = functional_call(self.model, dict(parameters), (ids.unsqueeze(0), positions))
            return (weights * token_losses(logits, targets)).sum()

        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no rule for another batch dimension
            gradients = vmap(grad(loss), in_dims=(None, 0, 0, 0, 0))(
                held, batch.ids, batch.positions, batch.targets, batch.weights
            )
        return torch.cat([gradients[name].flatten(1).float() for name in self.parameters], dim=1)

    def _loop(self, batch: RowBatch) -> Tensor:
        rows = []
        parameters = list(self.parameters.values())
        required = [p.requires_grad for p in parameters]
        for p in parameters:
            p.requires_grad_(True)
        try:
            for i in range(len(batch)):
                real = batch.weights[i] > 0
                logits = self.model(batch.ids[i : i + 1], batch.positions[i][real])
                loss = (batch.weights[i][real] * token_losses(logits, batch.targets[i][real])).sum()
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
                rows.append(torch.cat([gradient.flatten().float() for gradient in gradients]))
        finally:
            for p, before in zip(parameters, required, strict=True):
                p.requires_grad_(before)
        return torch.stack(rows)
