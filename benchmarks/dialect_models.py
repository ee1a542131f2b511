"""Reweighting problems whose best mix can be found by brute force: tables of logits, and a tiny Llama, on dialects."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.func import functional_call, vmap

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
    `bilevel mix` draws them. All mixes share repetitions and random numbers. Models train side by side (vmap).

    rep: the repetitions over which a loss is averaged.
    stream: draws with another stream are independent of these.
    """

    problem: Dialects
    steps: int
    lr: float
    rep: int = 8
    stream: int = 0
    known: dict[tuple[float, ...], Array] = field(default_factory=dict)

    @cached_property
    def rows(self) -> Tensor:
        """Shape: (sources, steps, repetitions, batch, length)."""
        p = self.problem
        shares = [[*mix, 0.0] for mix in p.mixes] + [[0.0] * len(p.target) + [1.0]] * p.noise
        count = self.steps * self.rep * p.batch_size
        drawn = [p.draw(share, count, 3, i, self.stream) for i, share in enumerate(shares)]
        return torch.stack(drawn).view(len(shares), self.steps, self.rep, p.batch_size, -1)

    @cached_property
    def parts(self) -> list[int]:
        """The dialects that the target has rows of."""
        return [d for d, share in enumerate(self.problem.target) if share]

    @cached_property
    def target(self) -> Tensor:
        """As many rows of each dialect of the target, to score by. Shape: (parts, 500, length)."""
        p = self.problem
        return torch.stack([p.draw(np.eye(len(p.chains))[d].tolist(), 500, 4, d) for d in self.parts])

    @cached_property
    def shares(self) -> Array:
        """How much each part of the target counts. Shape: (parts,)."""
        return np.array([self.problem.target[d] for d in self.parts])

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
            mixes = np.repeat(np.array(missing), self.rep, 0)
            values = self.train(mixes, np.tile(np.arange(self.rep), len(missing))) @ self.shares
            self.known.update(zip(missing, values.reshape(len(missing), self.rep), strict=True))
        return np.array([self.known[tuple(w)] for w in weights.tolist()])

    def train(self, weights: Array, repetition: NDArray[np.int64], together: int = 12) -> Array:
        """The loss of each part of the target after training on a mix. Shapes: (n, sources), (n,) -> (n, parts)."""
        if len(weights) > together:
            halves = (slice(None, together), slice(together, None))
            return np.concatenate([self.train(weights[half], repetition[half], together) for half in halves])
        module = self.problem.lower()
        stacked = {
            name: p.detach().expand(len(weights), *p.shape).clone().requires_grad_() for name, p in module.named_parameters()
        }
        optimizer = torch.optim.AdamW(stacked.values(), lr=self.lr, weight_decay=0.0)

        def loss(parameters: dict[str, Tensor], ids: Tensor) -> Tensor:
            return self.problem.row_losses(lambda *args: functional_call(module, parameters, args), ids).mean()

        for t in range(self.steps):
            optimizer.zero_grad()
            vmap(loss)(stacked, self._drawn(weights, repetition, t)).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        with torch.no_grad():
            scored = [vmap(loss, in_dims=(0, None))(stacked, rows) for rows in self.target]
        value: Array = torch.stack(scored, 1).double().numpy()
        return value

    def _drawn(self, weights: Array, repetition: NDArray[np.int64], t: int) -> Tensor:
        """The batches of step t. Shape: (n, batch, length)."""
        size, draw = self.problem.batch_size, np.random.default_rng([7, t, self.stream])
        places = (np.arange(size) + draw.random((self.rep, 1))) / size
        ends = weights.cumsum(1)[:, None, :-1]
        source = torch.from_numpy((places[repetition][:, :, None] >= ends).sum(-1))
        return self.rows[source, t, torch.from_numpy(repetition)[:, None], torch.arange(size)[None, :]]

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

    def by_law(self, runs: int = 96) -> Array:
        """The best mix of many sources: two swarms of runs, the second around the answer of the first, and a law.

        L(p) = c + Σ_i a_i p_i + b_i log(p_i + 0.1): a loss rises steeply where what it needs is missing. Each run has a mix
        of its own. (On tables of logits the answer is as good as that of `optimum`, to .0005 nats.)
        """
        random, k = np.random.default_rng([9, self.stream]), len(self.problem.names)
        best, mixes, losses = np.full(k, 1 / k), np.empty((0, k)), np.empty(0)
        for spread in (1.0, 0.5):
            drawn = np.array([_softmax(np.log(best + 0.02) + spread * random.standard_normal(k)) for _ in range(runs)])
            mixes = np.concatenate([mixes, drawn])
            losses = np.concatenate([losses, self.train(drawn, np.arange(runs) % self.rep) @ self.shares])
            features = np.hstack([mixes, np.log(mixes + 0.1)])
            spreads = features - features.mean(0)
            penalty = 1e-6 * len(mixes) * np.eye(2 * k)
            slopes = np.linalg.solve(spreads.T @ spreads + penalty, spreads.T @ (losses - losses.mean()))
            best = min(
                (minimize(_law, np.log(start + 1e-3), args=(slopes,)) for start in (mixes[losses.argmin()], best)),
                key=lambda found: float(found.fun),
            ).x
            best = _softmax(best)
        return best

    def _of_two(self, shares: Array) -> Array:
        mixes = np.zeros((len(shares), len(self.problem.names)))
        mixes[:, 0], mixes[:, 1] = shares, 1 - shares
        return mixes


def _law(logits: Array, slopes: Array) -> float:
    p = _softmax(logits)
    return float(np.concatenate([p, np.log(p + 0.1)]) @ slopes)


def _softmax(logits: Array) -> Array:
    e = np.exp(logits - logits.max())
    value: Array = e / e.sum()
    return value
