"""The parts of a run that a plan depends on, and the passes that one step of it makes."""

from __future__ import annotations

from dataclasses import dataclass

from bilevel.active import Active
from bilevel.backend import Backend, Placement
from bilevel.cost import Cost
from bilevel.errors import InputError
from bilevel.planning.footprint import Footprint, share
from bilevel.solver import Workload
from bilevel.tracing import Pass


@dataclass(frozen=True)
class Setup:
    """The parts of a run that a plan depends on, apart from the problem and the machine.

    seed, steps: those of the run, which decide the draws of the active rule.
    copied: whether checkpoints are copied, to be written while the next steps are taken.
    """

    backend: Backend
    active: Active
    workload: Workload
    seed: int = 0
    steps: int = 1
    copied: bool = True


@dataclass(frozen=True)
class Load:
    """Passes of one kind.

    times: how often they are made in a step.
    share: the rows of a process.
    rows: the rows of the largest micro-batch.
    """

    times: float
    share: int
    rows: int
    upper: bool = False
    backward: bool = True
    second_order: bool = False

    @property
    def micro_batches(self) -> float:
        """The number of micro-batches in a step."""
        return self.times * -(-self.share // self.rows)

    def traced(self, model: Footprint, draw: frozenset[str], *, recompute: bool) -> Pass:
        """One micro-batch, while these blocks train."""
        return model.passing(
            self.rows,
            draw if self.backward else frozenset(),
            recompute=recompute,
            upper=self.upper,
            second_order=self.second_order,
        )


def loads(workload: Workload, cost: Cost, placement: Placement) -> list[Load]:
    """The kinds of passes that there are, by a placement that says how many rows a micro-batch has.

    Raises `InputError` if there is none.
    """
    at_a_time = placement.micro_batch_size
    assert at_a_time != "auto"
    found = []
    for upper, of_batch, passes, forwards, products in (
        (False, cost.lower_rows, workload.lower_passes, workload.lower_forwards, workload.products),
        (True, cost.upper_rows, workload.upper_passes, workload.upper_forwards, 0),
    ):
        own = share(of_batch, placement.processes)
        rows = own if at_a_time is None else min(own, at_a_time)
        kinds = (
            Load(passes, own, rows, upper),
            Load(forwards, own, rows, upper, backward=False),
            Load(products, own, rows, upper, second_order=True),
        )
        found += [load for load in kinds if load.times and load.share]
    if not found:
        raise InputError("a step of this solver makes no pass over this problem's batches, so there is nothing to plan")
    return found
