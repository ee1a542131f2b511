"""The cost of a problem that states none: traced from its losses, against what running them takes."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bilevel import AID, All, Descent, InputError, ScaleBiO
from bilevel.planning.footprint import Footprint
from bilevel.planning.hardware import Hardware
from bilevel.planning.load import Setup
from bilevel.planning.plan import make_plan
from bilevel.problem import Forward, Problem, Shard, initialization_may_be_deferred
from bilevel.testing.session import Session
from bilevel_backends.torch_backend import TorchBackend

WIDTH, LOWER, UPPER = 16, 12, 6
MATRIX = 2 * WIDTH * WIDTH  # FLOPs of a product of one row with a square matrix


class Shift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(WIDTH))

    def forward(self) -> Tensor:
        return self.value * 1


@dataclass
class Perceptron(Problem[Tensor]):
    """Two square layers; the data are a buffer of the problem, as plain problems have them."""

    def __post_init__(self) -> None:
        self.built = 0
        self.rows = torch.randn(LOWER, WIDTH, generator=torch.Generator().manual_seed(0))

    def upper(self) -> nn.Module:
        return Shift()

    def lower(self) -> nn.Module:
        self.built += 1
        return nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False))

    def upper_loss(self, x: Forward, y: Forward, batch: Tensor) -> Any:
        return (y(batch) * y(-batch)).sum()

    def lower_loss(self, x: Forward, y: Forward, batch: Tensor) -> Any:
        loss = ((y(batch) - x()) ** 2).sum()
        return loss, {"all": loss.detach()}

    def upper_batch(self, index: int, shard: Shard) -> list[Tensor]:
        return [torch.stack(list(part)) for part in shard.split(list(self.rows[:UPPER]))]

    def lower_batch(self, index: int, shard: Shard) -> list[Tensor]:
        return [torch.stack(list(part)) for part in shard.split(list(self.rows))]


def plan(problem: Problem[Any], solver: Any = None, **backend: Any) -> Any:
    setup = Setup(TorchBackend(device="cpu", **backend), All(), (solver or ScaleBiO()).workload())
    hardware = Hardware(context=0, fragmentation=0, process=0)
    return make_plan(Footprint(problem.cost(), backend.get("dtype")), setup, hardware)


def test_rows_are_counted_on_the_first_batches() -> None:
    cost = Perceptron().cost()
    assert (cost.lower_rows, cost.upper_rows, cost.unit) == (LOWER, UPPER, "rows")


def test_each_level_has_passes_of_its_own() -> None:
    """A call takes 2 products a row forward, 2 for the weights and 1 for the input of the second layer; f calls y twice."""
    assert plan(Perceptron()).flops == 5 * MATRIX * (2 * LOWER + 2 * UPPER)
    assert plan(Perceptron(), micro_batch_size=4).flops == 5 * MATRIX * (2 * LOWER + 2 * UPPER)
    evaluated = plan(Perceptron(), Descent(evaluate_every=2, evaluation_batches=4))
    assert evaluated.flops == 5 * MATRIX * LOWER + 2 * 4 * MATRIX * UPPER
    assert evaluated.units == LOWER + 2 * UPPER


def test_a_second_order_product_has_the_flops_of_the_real_one() -> None:
    """Counted by torch while the backend computes one; AID takes three here: one in its loop, the residual and that of x."""
    problem, solver = Perceptron(), AID(lower_steps=2, cg_steps=1)
    with Session(problem, solver, TorchBackend(device="cpu")) as session:
        x, y, backend = session.state.x, session.variable("z"), session.backend
        with FlopCounterMode(display=False) as counter:
            batch, direction = problem.lower_batch(0, Shard()), backend.read(y)
            backend.backward_along(lambda b: problem.lower_loss(x, y, b), batch, y, direction, wrt={x: 1.0, y: 1.0})
    passes = 5 * MATRIX * (2 * LOWER + 2 * UPPER)
    assert plan(problem, solver).flops == passes + 3 * counter.get_total_flops()


def test_memory_is_that_of_the_largest_micro_batch() -> None:
    whole, pieces = plan(Perceptron()), plan(Perceptron(), micro_batch_size=3)
    assert (whole.rows, pieces.rows) == (LOWER, 3)
    assert whole.gpu["activations"] > pieces.gpu["activations"] > 0


def test_another_precision_counts_for_the_parameters() -> None:
    problem = Perceptron()
    problem.rows = problem.rows.bfloat16()
    assert plan(problem, dtype="bfloat16").gpu["parameters"] == 2 * 2 * 2 * WIDTH**2


def test_planning_leaves_the_problem_and_random_numbers_as_they_were() -> None:
    problem = Perceptron()
    before, state = problem.rows.clone(), torch.get_rng_state()
    plan(problem)
    assert torch.equal(problem.rows, before)
    assert type(problem.rows) is Tensor
    assert torch.equal(torch.get_rng_state(), state)
    assert problem.built == 1


def test_a_module_without_memory_is_planned_as_it_is() -> None:
    class Large(Perceptron):
        def lower(self) -> nn.Module:
            assert initialization_may_be_deferred()
            with torch.device("meta"):
                return super().lower()

    assert plan(Large()).gpu == plan(Perceptron()).gpu


def test_a_loss_that_asks_for_values_is_named() -> None:
    class Curious(Perceptron):
        def upper_loss(self, x: Forward, y: Forward, batch: Tensor) -> Any:
            return super().upper_loss(x, y, batch) * float(x().sum())

    with pytest.raises(InputError, match=r"Curious\.upper_loss cannot be traced .* decides by the values .* method `cost`"):
        plan(Curious())


def test_a_loss_that_leaves_torch_is_named() -> None:
    class Foreign(Perceptron):
        def lower_loss(self, x: Forward, y: Forward, batch: Tensor) -> Any:
            return torch.from_numpy(y(batch).detach().numpy()).sum()

    with pytest.raises(InputError, match=r"Foreign\.lower_loss cannot be traced"):
        plan(Foreign())


def test_a_loss_may_decide_by_its_data() -> None:
    class Choosy(Perceptron):
        def lower_loss(self, x: Forward, y: Forward, batch: Tensor) -> Any:
            kept = batch[batch.sum(1) > float(batch.sum()) / LOWER]
            return super().lower_loss(x, y, kept)

    assert 0 < plan(Choosy()).flops < plan(Perceptron()).flops


def test_a_share_of_labels_is_refused() -> None:
    with pytest.raises(InputError, match="leave out --labelled-share"):
        Perceptron().cost(0.5)
