"""A tiny regularized GPT-2 in float64 with one weight for each source: `llm-reweighting` small enough for exact answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bilevel.data import Stream, generator
from bilevel.distribution import Distribution
from bilevel.problem import Forward, Problem, Shard
from bilevel_llm.model.language_model import LanguageModel

VOCABULARY, LENGTH = 8, 6


@dataclass(frozen=True)
class Sequences:
    """Token sequences, all of one length, with the source of each. Shapes: (rows, length), (rows,)."""

    ids: Tensor
    source: Tensor


class RegularizedModel(nn.Module):
    """The language model that `llm-reweighting` trains; it returns logits and ½‖y - y_0‖².

    A pull towards the start y_0, rather than towards 0, keeps the minimum isolated: a rotation of the attention values that
    the output projection undoes changes neither the model nor its norm.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = LanguageModel(model)
        start = torch.cat([parameter.detach().flatten() for parameter in self.parameters()])
        self.start: Tensor
        self.register_buffer("start", start, persistent=False)

    def forward(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Logits after every position, and half the squared distance of all parameters from the start."""
        moved = torch.cat([parameter.flatten() for parameter in self.parameters()]) - self.start
        return self.model(ids, positions), 0.5 * (moved**2).sum()


@dataclass
class TinyLanguage(Problem[Sequences]):
    """g = Σ_i p_i(x) L_i(y) + ½ ρ‖y - y_0‖², f = L_validation(y); the sources follow different rules for the next token.

    rows: the number of rows of each source.
    ridge: ρ.
    instance: the seed of the data.
    """

    rows: int = 6
    ridge: float = 0.5
    instance: int = 0

    def upper(self) -> nn.Module:
        """The source weights."""
        return Distribution(["1", "3", "5"], torch.tensor([0.5, 0.3, 0.2]), floor=0.01)

    def lower(self) -> nn.Module:
        """A GPT-2 with one layer and eight dimensions."""
        from transformers import GPT2Config, GPT2LMHeadModel

        # not a Llama, whose norms and attention compute in float32 whatever they are given
        config = GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=LENGTH,
            n_embd=8,
            n_layer=1,
            n_head=2,
            n_inner=8,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            initializer_range=0.3,
            layer_norm_epsilon=0.1,
            attn_implementation="eager",
            bos_token_id=0,
            eos_token_id=0,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.instance)
            return RegularizedModel(GPT2LMHeadModel(config)).double()

    def upper_loss(self, x: Forward, y: Forward, batch: Sequences) -> Tensor:
        """f(y), the mean loss of the validation rows."""
        return _losses(y, batch)[0].mean()

    def lower_loss(self, x: Forward, y: Forward, batch: Sequences) -> Tensor:
        """g(x, y)."""
        losses, half_square = _losses(y, batch)
        means = torch.zeros(3, dtype=losses.dtype).index_add(0, batch.source, losses) / self.rows
        return torch.dot(x(), means) + self.ridge * half_square

    def upper_batch(self, index: int, shard: Shard) -> Sequence[Sequences]:
        """All validation rows."""
        return [self._data[1]]

    def lower_batch(self, index: int, shard: Shard) -> Sequence[Sequences]:
        """All training rows."""
        return [self._data[0]]

    @cached_property
    def _data(self) -> tuple[Sequences, Sequences]:
        random = generator(self.instance, Stream.INIT)

        def rows(step: int, count: int) -> Tensor:
            """Sequences that count in steps of `step`, in which a tenth of the tokens are random."""
            first = random.integers(VOCABULARY, size=(count, 1))
            ids = (first + step * torch.arange(LENGTH).numpy()) % VOCABULARY
            wrong = random.random(ids.shape) < 0.1
            ids[wrong] = random.integers(VOCABULARY, size=int(wrong.sum()))
            return torch.from_numpy(ids)

        training = torch.cat([rows(step, self.rows) for step in (1, 3, 5)])
        source = torch.arange(3).repeat_interleave(self.rows)
        return Sequences(training, source), Sequences(rows(1, self.rows), torch.zeros(self.rows, dtype=torch.int64))


def _losses(y: Forward, batch: Sequences) -> tuple[Tensor, Tensor]:
    """The mean loss of each row, and half the squared distance. In float64, since differences of 1e-10 count."""
    rows, length = batch.ids.shape
    positions = torch.arange(rows * length).view(rows, length)[:, :-1].flatten()
    logits, half_square = y(batch.ids, positions)
    losses = F.cross_entropy(logits, batch.ids[:, 1:].flatten(), reduction="none")
    return losses.view(rows, length - 1).mean(1), half_square
