"""The weights that a solver finds are the best ones also where the best mix is not a single source.

A corner hides errors: whatever pushes in roughly the right direction long enough arrives there. An optimum inside the
simplex is passed by a solver whose x is faster than its lower level, and missed by one whose signal is not the derivative.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel.data import Stream, generator
from bilevel.optimizer import SGD, AdamW
from bilevel.solver import Solver
from bilevel.solvers.rounds import Rounds
from bilevel.testing.session import Session, configure
from bilevel.verify.claims import Check, Reading, bound
from bilevel_problems.dialects import Dialects
from bilevel_problems.ridge_reweighting import RidgeReweighting
from bilevel_problems.tables import RowTable

SHARE = 0.7  # of the first source in the target
HORIZON, LR = 40, 0.02


class BetweenRules(RidgeReweighting):
    """Ridge regression on two sources with a rule each; the target's rule lies between them. Φ is known in closed form."""

    def __init__(self) -> None:
        super().__init__(clean=2, flipped=0, rows=400, validation_rows=400, ridge=1e-3)

    @cached_property
    def _data(self) -> tuple[RowTable, RowTable]:
        random = generator(self.instance, Stream.INIT)
        first, second = (torch.from_numpy(random.standard_normal(self.d)) for _ in range(2))

        def draw(rule: Tensor) -> tuple[Tensor, Tensor]:
            features = torch.from_numpy(random.standard_normal((self.rows, self.d)))
            return features, features @ rule + self.noise * torch.from_numpy(random.standard_normal(self.rows))

        features, targets = zip(*(draw(rule) for rule in (first, second)), strict=True)
        training = RowTable(torch.cat(features), torch.cat(targets), (self.rows,) * 2)
        return training, RowTable(*draw(SHARE * first + (1 - SHARE) * second), (self.rows,))

    def best_share(self) -> float:
        """The weight of the first source at which Φ is smallest, to 1e-4."""
        shares = np.linspace(0.01, 0.99, 9801)
        return float(
            shares[int(np.argmin([float(self.phi(torch.tensor([np.log(p), np.log(1 - p)]))) for p in shares[::20]])) * 20]
        )


class InteriorWeights(Check):
    """Ridge regression with gradient steps, without noise; and a table of logits with AdamW and minibatches."""

    statement = "the learned weights minimize the loss after K steps of training on a mix, also inside the simplex"
    hypotheses = "y and z start every round from the same weights; penalty large; x held within a round"
    source = "derived (the module `bilevel.solvers.rounds`); truth in closed form, and by training on a grid of mixes"
    standing = "derived"
    specific = "about weights of sources"

    def readings(self) -> Iterator[Reading]:
        """The weight of the first source, against the best one."""
        ridge = BetweenRules()
        for name, optimizer, lr in (("gradient steps", SGD(), 0.3), ("AdamW", AdamW(), 0.1)):
            learned = self._learn(ridge, self._solver(lr, optimizer, penalty=100.0), 6 * HORIZON)
            yield bound(
                f"weight - best weight, ridge, {name}", float(learned[0]) - ridge.best_share(), -0.03, 0.03,
                "the lower level is not quite solved in a round; a pull of a twentieth to equal weights; a bias of 1/α",
            )  # fmt: skip
        steps = HORIZON * (8 if self.quick else 12)
        errors = []
        for instance in (1,) if self.quick else (0, 1, 2):
            dialects = Dialects(target=[SHARE, 1 - SHARE], instance=instance)
            learned = self._learn(dialects, self._solver(LR, AdamW(), penalty=10.0), steps)
            errors.append(float(learned[0]) - _best_by_training(dialects))
            yield bound("weight of random words", float(learned[-1]), 0.0, 0.05, "they serve nothing")
        yield bound(
            "weight - best weight, dialects, AdamW", float(np.mean(errors)), -0.07, 0.07,
            "minibatches of 8 rows of each source: 0.02 from run to run; brute force is known to 0.01",
        )  # fmt: skip

    def _solver(self, lr: float, optimizer: SGD | AdamW, penalty: float) -> Solver[Any]:
        settings = {"horizon": HORIZON, "penalty": penalty, "lr_z": lr, "lr_y": lr, "lr_x": 0.05, "optimizer_x": AdamW()}
        return configure(
            self.solver or Rounds, needs=("penalty", "lr_z"), optimizer_z=optimizer, optimizer_y=optimizer, **settings
        )

    def _learn(self, problem: Any, solver: Solver[Any], steps: int) -> Tensor:
        with Session(problem, solver, seed=self.seed) as session:
            session.step(steps)
            return torch.softmax(session.values("x"), 0)


def _best_by_training(problem: Dialects, repetitions: int = 8) -> float:
    """The best weight of the first of two sources for K steps of AdamW on batches drawn from a mix: a parabola on a grid."""
    shares = np.arange(0.5, 0.96, 0.05)
    count = HORIZON * repetitions * problem.batch_size
    rows = torch.stack([problem.draw([*mix, 0.0], count, 3, i) for i, mix in enumerate(problem.mixes)])
    rows = rows.view(2, HORIZON, repetitions, problem.batch_size, -1)
    table = torch.zeros(len(shares) * repetitions, problem.vocabulary, problem.vocabulary, dtype=torch.float64)
    table.requires_grad_(True)
    optimizer = torch.optim.AdamW([table], lr=LR, weight_decay=0.0)
    place = (np.arange(problem.batch_size) + 0.5) / problem.batch_size
    source = torch.from_numpy((place[None, :] >= shares[:, None]).astype(np.int64))  # (shares, batch)
    every = torch.arange(len(table))[:, None, None]
    for t in range(HORIZON):
        ids = rows[
            source[:, None, :], t, torch.arange(repetitions)[None, :, None], torch.arange(problem.batch_size)
        ].flatten(0, 1)
        scores = torch.log_softmax(table, -1)[every, ids[..., :-1], ids[..., 1:]]
        optimizer.zero_grad()
        (-scores.mean((1, 2)).sum()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    target = problem.draw([*problem.target, 0.0], 2000, 4)
    with torch.no_grad():
        losses = -torch.log_softmax(table, -1)[:, target[:, :-1], target[:, 1:]].mean((1, 2))
    a, b, _ = np.polyfit(shares, losses.view(len(shares), repetitions).mean(1).numpy(), 2)
    return float(-b / (2 * a))
