"""A regularizer of the lower loss is exactly what the same term written into the loss by hand would be."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bilevel import AID, F2SA, LISA, AdamW, InputError, Problem, Proximity, Shard, WeightDecay, fit, fit_many
from bilevel.regularizer import Regularizer
from bilevel.testing.hypergradient import hypergradient
from bilevel.testing.session import Session
from bilevel_backends.torch_backend import TorchBackend
from tests.bilevel.solvers.grid import Case, grid

STRENGTH = 0.3
TERMS = {"weight decay": WeightDecay(STRENGTH), "proximity": Proximity(STRENGTH)}
EXACT = {"rtol": 1e-12, "atol": 1e-12}


class Net(nn.Module):
    """Layers, a parameter that does not train, and the term by hand: a call without rows returns it."""

    def __init__(self, anchored: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.double()
        for name, parameter in list(self.layers.named_parameters()):
            start = parameter.detach().clone() if anchored else torch.zeros_like(parameter)
            self.register_buffer(name.replace(".", "_"), start, persistent=False)

    def forward(self, rows: Tensor | None = None) -> Tensor:
        if rows is None:
            away = [
                (p - self.get_buffer(name.replace(".", "_"))).square().sum() for name, p in self.layers.named_parameters()
            ]
            return STRENGTH / 2 * torch.stack(away).sum()
        for layer in self.layers:
            rows = torch.tanh(layer(rows)) + rows
        return rows * self.frozen


@dataclasses.dataclass
class Rows(Problem[Tensor]):
    """Rows weighted by x, and more of them; the term added by the package, or by hand."""

    by_hand: bool
    anchored: bool
    smooth = True
    strongly_convex = None

    def __post_init__(self) -> None:
        self.rows = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        if not self.by_hand:
            self.lower_regularizer = TERMS["proximity" if self.anchored else "weight decay"]

    def upper(self) -> Tensor:
        return torch.full((3,), 0.2, dtype=torch.float64)

    def lower(self) -> nn.Module:
        return Net(self.anchored)

    def upper_loss(self, x: Any, y: Any, batch: Tensor) -> Tensor:
        return (y(batch) - 1).square().sum() / 6 + x().square().sum() * len(batch) / 60

    def lower_loss(self, x: Any, y: Any, batch: Tensor) -> Any:
        fit = 0.5 * ((y(batch) - batch * x()).square().sum() / 6)
        term = len(batch) / 6 * y() if self.by_hand else torch.zeros((), dtype=torch.float64)
        return fit + term, {"fit": fit.detach()}

    def upper_batch(self, index: int, shard: Shard) -> Sequence[Tensor]:
        return [torch.stack(list(part)) for part in shard.split(list(self.rows + 1))]

    lower_batch = upper_batch


@grid(without=lambda case: case.known.repeats or case.known.strongly_convex)
@pytest.mark.parametrize(("anchored", "micro_batch_size"), [(True, 2), (False, None)])
def test_every_solver_takes_the_steps_of_the_loss_by_hand(case: Case, anchored: bool, micro_batch_size: int | None) -> None:
    solver = dataclasses.replace(case.solver, lr_z=0.2)
    active = None if case.second_order else LISA(blocks=1, period=2)  # blocks that have trained, and rest, count in g
    runs = [
        fit(Rows(by_hand, anchored), solver, TorchBackend(micro_batch_size=micro_batch_size), steps=5, active=active)
        for by_hand in (False, True)
    ]
    torch.testing.assert_close(runs[0].x["value"], runs[1].x["value"], **EXACT)
    for mine, other in zip(runs[0].history, runs[1].history, strict=True):
        for key, value in other.metrics.items():
            if isinstance(value, float):
                assert mine.metrics[key] == pytest.approx(value, rel=1e-10, abs=1e-12), f"step {mine.step}: {key}"


@dataclasses.dataclass
class Least(Problem[None]):
    """g = ½‖y - x‖² + the term: y*(x) = (x + λ c)/(1 + λ), strongly convex for the solvers that need it."""

    by_hand: bool = False
    anchored: bool = True

    upper_data = lower_data = None
    smooth = strongly_convex = True

    def __post_init__(self) -> None:
        self.start = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
        if not self.by_hand:
            self.lower_regularizer = TERMS["proximity" if self.anchored else "weight decay"]

    def upper(self) -> Tensor:
        return torch.zeros(3, dtype=torch.float64)

    def lower(self) -> Tensor:
        return self.start

    def upper_loss(self, x: Any, y: Any, batch: None) -> Tensor:
        return 0.5 * (y() - 1).square().sum() + 0.05 * x().square().sum()

    def lower_loss(self, x: Any, y: Any, batch: None) -> Tensor:
        g = 0.5 * (y() - x()).square().sum()
        return g + STRENGTH / 2 * (y() - self.start * self.anchored).square().sum() if self.by_hand else g


@grid(without=lambda case: not case.known.strongly_convex or case.known.repeats)
@pytest.mark.parametrize("anchored", [True, False])
def test_second_derivatives_and_negative_tilts_have_the_term_too(case: Case, anchored: bool) -> None:
    runs = [fit(Least(by_hand, anchored), case.solver, TorchBackend(), steps=5) for by_hand in (False, True)]
    torch.testing.assert_close(runs[0].x["value"], runs[1].x["value"], **EXACT)
    losses = [[record.metrics["lower_loss"] for record in run.history] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


@pytest.mark.parametrize("anchored", [True, False])
def test_the_reference_hypergradient_and_runs_side_by_side_have_it(anchored: bool) -> None:
    found = [hypergradient(Least(by_hand, anchored)).value["value"] for by_hand in (False, True)]
    torch.testing.assert_close(found[0], found[1], **EXACT)
    for solvers in (
        [F2SA(lr_x=lr, lr_z=0.5) for lr in (0.1, 0.2)],
        [AID(lr_x=0.1, lr_z=0.5, cg_steps=3, cg_tolerance=None)],
    ):
        many = [fit_many(Least(by_hand, anchored), solvers, TorchBackend(), steps=5) for by_hand in (False, True)]
        torch.testing.assert_close(many[0].x["value"], many[1].x["value"], **EXACT)
        torch.testing.assert_close(many[0].metrics["lower_loss"], many[1].metrics["lower_loss"], **EXACT)


def test_a_weight_of_the_gradient_is_that_of_the_term_too() -> None:
    found = []
    for by_hand in (False, True):
        with Session(Least(by_hand, False), F2SA()) as session:
            x, y = session.state.x, session.state.replicas["y"]
            session.backend.backward(lambda b: session.problem.lower_loss(x, y, b), [None], wrt={y: -0.5})
            found.append(session.backend.take_gradient(y).parts["value"])
    torch.testing.assert_close(found[0], found[1], **EXACT)


def test_a_resumed_run_is_anchored_at_the_first_start(tmp_path: Path) -> None:
    problem, solver = Rows(False, True), F2SA(lr_x=0.1, lr_z=0.2, optimizer_z=AdamW())
    fit(problem, solver, TorchBackend(), steps=3, output=tmp_path / "run")
    for where, resume in (("run", True), ("whole", False)):
        fit(problem, solver, TorchBackend(), steps=6, output=tmp_path / where, resume=resume)
    lines = [(tmp_path / where / "metrics.jsonl").read_text().splitlines()[-1] for where in ("run", "whole")]
    assert json.loads(lines[0])["metrics"] == json.loads(lines[1])["metrics"]


@pytest.mark.parametrize("kind", [WeightDecay, Proximity])
@pytest.mark.parametrize("strength", [0.0, -1.0, float("nan"), float("inf")])
def test_a_strength_that_is_none_is_refused(kind: type[Regularizer], strength: float) -> None:
    with pytest.raises(InputError, match=f"strength of {kind.__name__} must be positive and finite"):
        kind(strength)
