"""What every registered solver says of its steps, against what its steps do; and the documentation's table of it."""

import dataclasses
import re
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bilevel import All, F2SAp, Forward, Problem, Rounds, Shard, Solver, Workload
from bilevel.planning.footprint import Footprint
from bilevel.planning.hardware import Hardware
from bilevel.planning.load import Setup
from bilevel.planning.plan import make_plan
from bilevel.testing.contract import ContractError
from bilevel.testing.session import Session, configure
from bilevel.testing.workload import COUNTS, check_workload
from bilevel_backends.torch_backend import TorchBackend
from bilevel_problems.ridge_reweighting import RidgeReweighting
from tests.bilevel.solvers.grid import CASES, Case, Variant, first_party, grid, small
from tests.bilevel_llm.conftest import data, model_directory, problem  # noqa: F401 (fixtures)

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "aid": {"cg_steps": 1, "cg_tolerance": 1e9},  # as many products as there may be
    "descent": {"evaluate_every": 4, "evaluation_batches": 2},
    "doremi": {"reference_steps": 1},
}
"""What makes each step like the next, or four like the next four; where it takes any."""
REGISTERED = {name: part.load() for name, part in first_party().parts["solvers"].items()}
TABLE = Path(__file__).parents[3] / "docs" / "how-to-choose-a-solver.md"


@pytest.mark.parametrize("lower_steps", [1, 3])
@pytest.mark.parametrize("name", REGISTERED)
def test_every_registered_solver_does_what_it_says(name: str, lower_steps: int, problem: Callable[..., Any]) -> None:  # noqa: F811
    solver = configure(REGISTERED[name], **{"lower_steps": lower_steps, "lr_z": 1e-3, **SETTINGS.get(name, {})})
    solved = RidgeReweighting(rows=5, d=2) if solver.takes is Problem else problem()
    check_workload(solver, solved)


@grid()
def test_every_kind_of_a_solver_does_what_it_says(case: Case) -> None:
    settings = {**case.known.settings, **SETTINGS.get(case.registered, {})}
    check_workload(configure(type(case.solver), **settings), RidgeReweighting(rows=5, d=2))


RIGHT = F2SAp(lower_steps=2)


@pytest.mark.parametrize("wrong", [{"lower_passes": 7}, {"upper_forwards": 1}, {"products": 1}, {"replicas": {}}])
def test_a_wrong_count_is_told(wrong: dict[str, Any]) -> None:
    class Wrong(F2SAp):
        def workload(self) -> Workload:
            return dataclasses.replace(RIGHT.workload(), **wrong)

    check_workload(RIGHT, small())
    with pytest.raises(ContractError, match=f"the workload of Wrong does not match its steps: {next(iter(wrong))} is"):
        check_workload(Wrong(lower_steps=2), small())


SIDE = 37
MATRIX = 8 * SIDE**2
"""Bytes of the lower variable, beside which all else is small: it only ever multiplies a vector."""


class Matrix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        start = torch.randn(SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        self.value = nn.Parameter(start)

    def forward(self) -> Tensor:
        return self.value @ torch.linspace(-1, 1, SIDE, dtype=torch.float64)


class Vector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(SIDE, dtype=torch.float64))

    def forward(self) -> Tensor:
        return self.value * 1


class Wide(Problem[Tensor]):
    def upper(self) -> nn.Module:
        return Vector()

    def lower(self) -> nn.Module:
        return Matrix()

    def upper_loss(self, x: Forward, y: Forward, batch: Tensor) -> Tensor:
        return ((y() - 1) ** 2).sum() / 20

    def lower_loss(self, x: Forward, y: Forward, batch: Tensor) -> Tensor:
        return ((y() - x()) ** 2).sum() / 20

    def upper_batch(self, index: int, shard: Shard) -> list[Tensor]:
        return [torch.zeros(1)]

    def lower_batch(self, index: int, shard: Shard) -> list[Tensor]:
        return [torch.zeros(1)]


class Live(TorchDispatchMode):
    """Counts tensors of the size of the lower variable: most at a time, beside those that are known."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.live = self.most = 0
        self.seen = {t.untyped_storage()._cdata for t in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes() == MATRIX:
                storage = tensor.untyped_storage()
                if storage._cdata not in self.seen:
                    self.seen.add(storage._cdata)
                    self.live += 1
                    self.most = max(self.most, self.live)
                    weakref.finalize(storage, self._free, storage._cdata)
        return out

    def _free(self, key: int) -> None:
        self.seen.discard(key)
        self.live -= 1


def most_matrices(solver: Solver[Any]) -> int:
    """Gradients, vectors and whatever else a step holds of the size of the lower variable, beside its weights."""
    with Session(Wide(), solver, TorchBackend(device="cpu")) as session:
        session.step(2)
        replicas = session.state.replicas.values()
        held = Live([t for r in replicas for t in [*r.module.parameters(), *r.masters.values()]])  # type: ignore[attr-defined]
        with held:
            session.step(2)
    return held.most


@pytest.mark.parametrize(
    "case", [*(case.param for case in CASES.values() if not case.known.repeats), pytest.param(None, id="descent")]
)
def test_the_planned_gradients_and_passes_are_what_a_step_holds(case: Case | None) -> None:
    """At most one matrix too many, as the worst moment of the vectors need not be that of a pass."""
    kind, registered = (type(case.solver), case.registered) if case else (REGISTERED["descent"], "descent")
    settings = {**(case.known.settings if case else {}), **SETTINGS.get(registered, {}), "lr_x": 0.01, "lr_z": 0.01}
    solver = configure(kind, **settings)
    plan = make_plan(Footprint(Wide().cost(), None), Setup(TorchBackend(), All(), solver.workload()), Hardware())
    planned = sum(plan.gpu[part] for part in ("gradients", "activations", "output, loss and working memory"))
    assert round(planned / MATRIX) - most_matrices(solver) in (0, 1)


def rows_of_the_table() -> dict[str, tuple[str, str]]:
    """Solver, as its row is headed -> (gradients a step, copies of y)."""
    lines = TABLE.read_text().split("| solver | requirements on the lower level |")[1].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: (row[2], row[3]) for row in cells}


def value(expression: str, **names: float) -> float:
    """Of "p (2 T + 2) + T + 1"."""
    return float(eval(re.sub(r"(?<=[\dpT)]) (?=[pT(])", "*", expression), {}, names))


def heading(case: Case) -> str:
    kinds = {"f2sa-p": f"f2sa-p, p {'odd' if getattr(case.solver, 'p', 0) % 2 else 'even'}"}
    if case.registered == "pbgd":
        return f"pbgd, {case.known.label or 'value gap'}"
    return kinds.get(case.registered, case.registered)


OF_A_DISTRIBUTION = Case("rounds", Rounds(), Variant())
"""Not in the grid, whose upper variables are vectors."""
DOCUMENTED = [*CASES.values(), OF_A_DISTRIBUTION]


@pytest.mark.parametrize("case", [case.param for case in DOCUMENTED])
def test_the_documentation_counts_as_the_solver_does(case: Case) -> None:
    gradients, copies = rows_of_the_table()[heading(case)]
    work = case.solver.workload()
    names = {"T": getattr(case.solver, "lower_steps", 1), "p": getattr(case.solver, "p", 1)}
    passes, _, products = gradients.partition(", and ")
    assert value(passes, **names) == sum(getattr(work, name) for name in COUNTS if name != "products")
    products = products.replace("CG steps", str(getattr(case.solver, "cg_steps", 0)))
    assert value(re.sub(r" second-order products?", "", products) or "0", **names) == work.products
    replicas, _, vectors = copies.partition("; ")
    assert value(replicas, **names) == len(work.replicas)
    assert int(vectors.split()[0]) == (len(work.replicas) if work.vectors is None else work.vectors)


def test_the_documentation_has_no_row_of_a_solver_that_is_not_there() -> None:
    assert set(rows_of_the_table()) == {heading(case) for case in DOCUMENTED}
