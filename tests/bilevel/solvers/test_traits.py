"""A solver that needs more than a problem has says so before anything is built."""

from typing import Any

import pytest

from bilevel import AID, BOME, MEHA, PBGD, F2SAp, InputError, ScaleBiO, Solver, fit
from bilevel_backends.torch_backend import TorchBackend
from tests.conftest import Distance


class Kinked(Distance):
    smooth = False

    def lower(self):  # type: ignore[no-untyped-def]
        pytest.fail("something was built")


class Flat(Distance):
    strongly_convex = False


@pytest.mark.parametrize("solver", [AID(), PBGD(kind="gradient-norm"), F2SAp(p=2)])
def test_second_derivatives_are_asked_for(solver: Solver[Any]) -> None:
    with pytest.raises(InputError, match="needs second derivatives, and the problem Kinked"):
        fit(Kinked(), solver, TorchBackend(device="cpu"), steps=1)


@pytest.mark.parametrize("solver", [AID(), F2SAp(p=3)])
def test_strong_convexity_is_asked_for(solver: Solver[Any]) -> None:
    with pytest.raises(InputError, match="needs a lower loss that is strongly convex in y, and the problem Flat"):
        fit(Flat(), solver, TorchBackend(device="cpu"), steps=1)


@pytest.mark.parametrize("solver", [ScaleBiO(), BOME(), MEHA(), PBGD(), F2SAp(p=1)])
def test_solvers_that_need_neither_run(solver: Solver[Any]) -> None:
    assert len(fit(Flat(), solver, TorchBackend(device="cpu"), steps=2).history) == 2
