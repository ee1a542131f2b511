"""A causal language model that computes logits only where something is to be predicted."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bilevel import Forward
from bilevel_llm.data.batches import TokenBatch
from bilevel_llm.data.packing import Packing
from bilevel_llm.model.packed_attention import packed_inputs, padded_inputs, use_packed_attention
from bilevel_llm.model.token_losses import token_losses


class LanguageModel(nn.Module):
    """Wraps any Hugging Face causal LM.

    read: where the weights of a model without memory are (`ModelFiles.load_skeleton`); None for a model that has them.

    Most positions of an instruction batch carry no label, and the vocabulary projection is the largest single matrix, so
    the positions are picked before it. The pick is a hook on the model's own output layer: whatever the architecture
    does to its logits afterwards (scaling, capping) still happens.
    """

    def __init__(self, model: Any, read: Callable[[str], Tensor] | None = None) -> None:
        super().__init__()
        self.model = model
        if read is not None:
            self.stored_weight = lambda name: read(name.removeprefix("model."))
        self.can_pack = use_packed_attention(model)
        self.eval()  # no dropout: the two replicas, and all rows that share a token, must see the same function

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding, for block discovery."""
        return self.model.get_input_embeddings()  # type: ignore[no-any-return]

    def get_output_embeddings(self) -> nn.Module:
        """The output layer, for block discovery."""
        return self.model.get_output_embeddings()  # type: ignore[no-any-return]

    def forward(self, ids: Tensor, positions: Tensor, packing: Packing | None = None) -> Tensor:
        """Logits of the next token at the given places.

        ids: (rows, length), padded on the right. positions: indices into the flattened (rows * length), shape (n,).
        packing: of these rows and positions; None computes every place of the rows. The logits are the same, to rounding,
            in a model for which `suitability.examine` says so.
        Returns: (n, vocabulary), in the model's precision. Raises `ValueError` for a packing that the model cannot take.
        """
        if packing is None:
            with padded_inputs(self.model, ids) as inputs:
                return self._logits(inputs, positions)
        if not self.can_pack or self.training:
            raise ValueError("this model cannot take packed rows: its attention is its own, or it may draw dropout")
        with packed_inputs(ids, packing) as inputs:
            return self._logits(inputs, packing.token[positions // ids.shape[1], positions % ids.shape[1]])

    def _logits(self, inputs: Mapping[str, Any], positions: Tensor) -> Tensor:
        """The logits at places of the flattened inputs."""

        def pick(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (inputs[0].flatten(0, 1).index_select(0, positions), *inputs[1:])

        hook = self.get_output_embeddings().register_forward_pre_hook(pick)
        try:
            # without a dimension for the batch; removing one here would return a view, which FSDP cannot guard
            logits: Tensor = self.model(**inputs, use_cache=False).logits
        finally:
            hook.remove()
        return logits


def batch_logits(model: Forward, batch: TokenBatch) -> Tensor:
    """The logits from which every target of a micro-batch is predicted. Shape: (targets, vocabulary)."""
    packing = () if batch.packing is None else (batch.packing,)
    logits: Tensor = model(batch.ids, batch.positions, *packing)
    return logits


def batch_losses(model: Forward, batch: TokenBatch) -> Tensor:
    """The loss of every target of a micro-batch. Shape: (targets,).

    To be summed in float64 (where the device has it): what moves the weights of data is a small difference of such sums.
    """
    losses = token_losses(batch_logits(model, batch), batch.targets)
    return losses.to(torch.float32 if losses.device.type == "mps" else torch.float64)
