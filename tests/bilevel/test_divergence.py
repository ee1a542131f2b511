"""A number that is not finite: which loss, which variable, which step size, or that it is the data."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import F2SA, NonFiniteError, Power, fit
from bilevel_backends.torch_backend import TorchBackend
from tests.bilevel.solvers.grid import CASES, Case, grid, small
from tests.conftest import Distance


@grid(without=lambda case: case.known.repeats)
@pytest.mark.parametrize("wild", ["lr_z", "lr_x"])
def test_every_solver_names_the_variable_that_blew_up_and_its_step_size(case: Case, wild: str) -> None:
    own = wild == "lr_z" and getattr(case.solver, "lr_y", None) is not None
    solver = dataclasses.replace(case.solver, **{wild: 1e30}, **({"lr_y": 1e30} if own else {}))
    setting = "lr_[yz]" if wild == "lr_z" else "lr_x"
    with pytest.raises(
        NonFiniteError, match=rf"^step \d+: .* (is (inf|nan|not finite)|overflows).*{setting} = 1e\+30: lower it, or clip"
    ):
        fit(small(), solver, TorchBackend(), steps=40)


def test_what_is_not_finite_before_anything_moved_is_the_data_or_the_start() -> None:
    class Odd(Distance):
        def upper_batch(self, index: int, shard: Any) -> list[Tensor]:
            return [batch * torch.nan for batch in super().upper_batch(index, shard)]

    with pytest.raises(
        NonFiniteError, match=r"^step 0: f\(y\) is nan, before any variable has moved; check the data of this"
    ):
        fit(Odd(), CASES["pbgd, gradient norm"].solver, TorchBackend(), steps=5)


def test_odd_data_later_on_are_not_blamed_on_step_sizes() -> None:
    class Poisoned(Distance):
        def lower_batch(self, index: int, shard: Any) -> list[Tensor]:
            return [batch / (index != 9) for batch in super().lower_batch(index, shard)]

    with pytest.raises(
        NonFiniteError, match=r"^step 4: g\(z\) is (inf|nan) \(.*\), though no variable has grown much; check the data"
    ):
        fit(Poisoned(noise=0.1), F2SA(), TorchBackend(), steps=10)


def test_a_schedule_is_named_by_its_value_at_the_step() -> None:
    solver = F2SA(lr_z=Power(1e-3, 40.0), lr_x=1e-3)
    with pytest.raises(NonFiniteError, match=r"^step (\d+): .*has lr_z = \d\.?\d*e\+\d\d: lower it"):
        fit(Distance(), solver, TorchBackend(), steps=200)
