"""A solver that needs more than a problem has says so before anything is built."""

import pytest

from bilevel import Descent, InputError, fit
from bilevel_backends.torch_backend import TorchBackend
from tests.bilevel.solvers.grid import Case, grid
from tests.conftest import Distance


class Kinked(Distance):
    smooth = False

    def lower(self):  # type: ignore[no-untyped-def]
        pytest.fail("something was built")


class Flat(Distance):
    strongly_convex = False


class Plain(Distance):
    smooth = False
    strongly_convex = False


@grid(without=lambda case: not case.known.smooth)
def test_second_derivatives_are_asked_for(case: Case) -> None:
    with pytest.raises(InputError, match="needs second derivatives, and the problem Kinked"):
        fit(Kinked(), case.solver, TorchBackend(device="cpu"), steps=1)


@grid(without=lambda case: not case.known.strongly_convex)
def test_strong_convexity_is_asked_for(case: Case) -> None:
    with pytest.raises(InputError, match="needs a lower loss that is strongly convex in y, and the problem Flat"):
        fit(Flat(), case.solver, TorchBackend(device="cpu"), steps=1)


@grid(without=lambda case: case.known.smooth or case.known.strongly_convex)
def test_solvers_that_need_neither_run(case: Case) -> None:
    assert len(fit(Plain(), case.solver, TorchBackend(device="cpu"), steps=2).history) == 2


def test_training_alone_needs_neither() -> None:
    assert len(fit(Plain(), Descent(), TorchBackend(device="cpu"), steps=2).history) == 2
