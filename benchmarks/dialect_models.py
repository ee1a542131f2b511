"""Reweighting problems whose best mix can be found by brute force: tables of logits, and a tiny Llama, on dialects."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bilevel import Forward
from bilevel_problems.dialects import Dialects

Array = NDArray[np.float64]


class LogProbabilities(nn.Module):
    """A Llama of four layers of width 48; it returns log-probabilities of the next word."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=64,
            attn_implementation="eager",
            use_cache=False,
        )
        self.model = LlamaForCausalLM(config)

    def forward(self, ids: Tensor) -> Tensor:
        """Shapes: (rows, length) -> (rows, length, vocabulary)."""
        return torch.log_softmax(self.model(input_ids=ids).logits.float(), -1)


@dataclass
class LlamaDialects(Dialects):
    """Dialects learned by a tiny Llama, which starts from the same random weights whatever the seed of the run."""

    def lower(self) -> nn.Module:
        """The model."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return LogProbabilities(self.vocabulary)

    def row_losses(self, y: Forward, ids: Tensor) -> Tensor:
        """The mean loss of every row."""
        scores = y(ids[:, :-1])
        losses: Tensor = -scores.gather(2, ids[:, 1:, None]).squeeze(2).mean(1).double()
        return losses


@dataclass
class BruteForce:
    """Φ_K by training: K steps of AdamW on batches that are drawn from a mix, scored on rows of the target.

    Rows are drawn anew, from the dialects that `problem` has its own from, so that the truth is that of the kind, not of the
    rows. A batch has as many rows of a source as its weight says, rounded up or down at random (systematic sampling), as
    `bilevel mix` draws them. Repetitions and mixes share their random numbers.

    rep: the repetitions over which a loss is averaged.
    """

    problem: Dialects
    steps: int
    lr: float
    rep: int = 8
    known: dict[tuple[float, ...], Array] = field(default_factory=dict)

    @cached_property
    def rows(self) -> Tensor:
        """Shape: (sources, steps, repetitions, batch, length)."""
        p = self.problem
        shares = [[*mix, 0.0] for mix in p.mixes] + [[0.0] * len(p.target) + [1.0]] * p.noise
        count = self.steps * self.rep * p.batch_size
        drawn = [p.draw(share, count, 3, i) for i, share in enumerate(shares)]
        return torch.stack(drawn).view(len(shares), self.steps, self.rep, p.batch_size, -1)

    @cached_property
    def target(self) -> Tensor:
        """Rows to score by. Shape: (2000, length)."""
        return self.problem.draw([*self.problem.target, 0.0], 2000, 4)

    def losses(self, weights: Array) -> Array:
        """The loss after K steps on each mix. Shape: (n, sources) -> (n,)."""
        value: Array = self.repeated(weights).mean(1)
        return value

    def error(self, weights: Array) -> float:
        """The standard error of a difference of losses of two mixes, which share their rows."""
        first, second = self.repeated(weights)
        return float((first - second).std(ddof=1) / np.sqrt(self.rep))

    def repeated(self, weights: Array) -> Array:
        """Shape: (n, repetitions)."""
        missing = [tuple(w) for w in weights.tolist() if tuple(w) not in self.known]
        if missing:
            self.known.update(zip(missing, self._train(np.array(missing)), strict=True))
        return np.array([self.known[tuple(w)] for w in weights.tolist()])

    def _drawn(self, weights: Array, t: int) -> Tensor:
        """The batches of step t. Shape: (n, repetitions, batch, length)."""
        size, draw = self.problem.batch_size, np.random.default_rng([7, t])
        places = (np.arange(size) + draw.random((self.rep, 1))) / size
        ends = weights.cumsum(1)[:, None, None, :-1]
        source = torch.from_numpy((places[None, :, :, None] >= ends).sum(-1))
        rep, row = torch.arange(self.rep)[:, None], torch.arange(size)[None, :]
        return self.rows[source, t, rep, row]

    def _train(self, weights: Array) -> Array:
        if isinstance(self.problem, LlamaDialects):
            return np.array([[self._train_model(w, r) for r in range(self.rep)] for w in weights])
        V = self.problem.vocabulary
        table = torch.zeros(len(weights) * self.rep, V, V, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.AdamW([table], lr=self.lr, weight_decay=0.0)
        every = torch.arange(len(table))[:, None, None]
        for t in range(self.steps):
            ids = self._drawn(weights, t).flatten(0, 1)
            scores = torch.log_softmax(table, -1)[every, ids[..., :-1], ids[..., 1:]]
            optimizer.zero_grad()
            (-scores.mean((1, 2)).sum()).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        with torch.no_grad():
            scores = torch.log_softmax(table, -1)[:, self.target[:, :-1], self.target[:, 1:]]
            value: Array = (-scores.mean((1, 2))).view(len(weights), self.rep).numpy()
            return value

    def _train_model(self, weights: Array, rep: int) -> float:
        model = self.problem.lower()
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.lr, weight_decay=0.0)
        for t in range(self.steps):
            loss = self.problem.row_losses(model, self._drawn(weights[None], t)[0, rep]).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        with torch.no_grad():
            return float(self.problem.row_losses(model, self.target).mean())

    def optimum(self, rounds: int = 30) -> Array:
        """The best mix: mirror descent with central differences, a step that is halved when the loss rises. Tables only."""
        k = len(self.problem.names)
        log_q, step, h = np.full(k, -np.log(k)), 2.0, 0.04
        now, scale = float(self.losses(_softmax(log_q)[None])[0]), 0.0
        for _ in range(rounds):
            q = _softmax(log_q)
            moved = [
                q + h * side * (np.eye(k)[i] - q) * (1 if side > 0 else min(1, q[i] / (1 - q[i])))
                for i in range(k)
                for side in (1, -1)
            ]
            values = self.losses(np.array(moved)).reshape(k, 2)
            widths = np.array([h * (1 + min(1.0, q[i] / (1 - q[i]))) for i in range(k)])
            slope = (values[:, 0] - values[:, 1]) / widths
            slope -= q @ slope
            scale = scale or float(np.abs(slope).max()) or 1.0
            candidate = log_q - step * slope / scale
            then = float(self.losses(_softmax(candidate)[None])[0])
            log_q, now, step = (candidate, then, step * 1.4) if then < now else (log_q, now, step * 0.4)
        return _softmax(log_q)

    def curve(self) -> np.poly1d:
        """The loss after K steps on a mix of the first two sources, as a cubic in the share of the first, near its minimum.

        It is fitted to the losses on a fine grid around the smallest of a coarse one, so that their noise is averaged, which
        is a good part of what one mix gains over the next. (A parabola over a wide grid is off by 0.05: the loss rises
        steeply where a source is missing.)
        """
        coarse = np.linspace(0.2, 1.0, 5)
        middle = float(coarse[int(self.losses(self._of_two(coarse)).argmin())])
        fine = np.unique(np.clip(middle + np.arange(-3, 4) * 0.05, 0.02, 0.98))
        return np.poly1d(np.polyfit(fine, self.losses(self._of_two(fine)), 3))

    def _of_two(self, shares: Array) -> Array:
        mixes = np.zeros((len(shares), len(self.problem.names)))
        mixes[:, 0], mixes[:, 1] = shares, 1 - shares
        return mixes


def _softmax(logits: Array) -> Array:
    e = np.exp(logits - logits.max())
    value: Array = e / e.sum()
    return value
