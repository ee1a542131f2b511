"""Every solver on the reweighting of a (tiny) language model: with blocks frozen, in bfloat16, in micro-batches."""

from collections.abc import Callable
from typing import Any

import pytest

from bilevel import LISA, AdamW, InputError, RunError, ScaleBiO, fit
from bilevel.backend import Vector
from bilevel.testing.session import Session, configure
from bilevel_backends.torch_backend import TorchBackend
from tests.bilevel.solvers.grid import CASES, SHARED, Case, grid
from tests.bilevel_llm.conftest import data, model_directory, problem  # noqa: F401 (fixtures)

Make = Callable[..., Any]


@grid(without=lambda case: case.second_order or case.known.repeats)
def test_first_order_solvers_train_some_blocks_in_bfloat16(case: Case, problem: Make) -> None:  # noqa: F811
    # a penalty of 5, as what the differences of f2sa-p resolve depends on the precision of x, which is float32 here
    settings = {**SHARED, **case.known.settings, "penalty": 5.0, "lr_x": 0.01, "lr_z": 1e-3, "optimizer_z": AdamW()}
    solver = configure(type(case.solver), **settings)
    backend = TorchBackend(device="cpu", dtype="bfloat16", micro_batch_size=3)
    result = fit(problem(), solver, backend, steps=2, active=LISA(blocks=1, period=1))
    first, last = (list(record.upper.values()) for record in result.history)
    assert first != last


def test_second_order_products_of_a_language_model_are_those_of_finite_differences(problem: Make) -> None:  # noqa: F811
    """The loss rounds to float32: over 1e-3, central differences are good to about 1e-4 of the product (measured 2e-5)."""
    backend = TorchBackend(device="cpu", dtype="float64")
    with Session(problem(), CASES["aid"].solver, backend) as session:
        z, x, batch = session.variable("z"), session.state.x, session.problem.lower_batch(0, backend.shard)

        def loss(b: Any) -> Any:
            return session.problem.lower_loss(x, z, b)

        def gradient(at: Vector) -> Vector:
            backend.write(z, at)
            backend.backward(loss, batch, wrt={z: 1.0})
            return backend.take_gradient(z)

        here = backend.read(z)
        backend.backward(loss, batch, wrt={z: 1.0})
        v = backend.take_gradient(z)
        backend.backward_along(loss, batch, z, v, wrt={z: 1.0})
        product = backend.take_gradient(z)
        differences = (1 / 2e-3) * (gradient(here + 1e-3 * v) - gradient(here - 1e-3 * v))
        off = product - differences
        assert (backend.dot(off, off) / backend.dot(product, product)) ** 0.5 < 1e-3


def test_aid_says_that_an_untrained_language_model_is_not_convex(problem: Make) -> None:  # noqa: F811
    with pytest.raises(RunError, match="not strongly convex"):
        fit(problem(), CASES["aid"].solver, TorchBackend(device="cpu", dtype="float64"), steps=1)


def test_frozen_blocks_and_second_derivatives_do_not_go_together(problem: Make) -> None:  # noqa: F811
    with pytest.raises(InputError, match="frozen"):
        fit(problem(), CASES["aid"].solver, TorchBackend(device="cpu"), steps=1, active=LISA(blocks=1))


def test_replicas_may_draw_blocks_of_their_own_unless_one_is_copied_to_the_other(problem: Make) -> None:  # noqa: F811
    """At this penalty y and z would be the same but for that."""
    independent = LISA(blocks=1, period=1, independent=True)
    solver = ScaleBiO(penalty=1e6, lr_z=1e-2, warmup=0)
    gaps = {
        active: fit(problem(), solver, TorchBackend(device="cpu"), steps=4, active=active, seed=2).history[-1].metrics["gap"]
        for active in (independent, LISA(blocks=1, period=1))
    }
    assert abs(gaps[independent]) > 30 * abs(gaps[LISA(blocks=1, period=1)])
    with pytest.raises(InputError, match=r"different active blocks.*set active\.independent=false"):
        fit(problem(), ScaleBiO(lr_z=1e-2, warmup=1), TorchBackend(device="cpu"), steps=9, active=independent)
