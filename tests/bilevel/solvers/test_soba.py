"""SOBA's three directions, put together from the closed forms of the losses."""

import torch

from bilevel import SOBA
from bilevel.testing.session import Session
from bilevel_problems.quadratic import Quadratic
from tests.bilevel.solvers.grid import small


def test_z_v_and_x_move_from_the_same_point_and_v_starts_at_zero() -> None:
    """Two steps, so that v has left 0; z starts off 0, whose weights the variable of v must not keep."""
    F = small().forms
    start = torch.tensor([0.5, -1.0, 2.0, 0.3], dtype=torch.float64)
    with Session(Quadratic.of(F, y=start), SOBA(lr_x=0.1, lr_z=0.5, lr_v=0.25)) as session:
        x, z, v = session.values("x"), start, torch.zeros_like(start)
        for _ in range(2):
            metrics = session.step()
            of_f = F.D @ x + F.E @ z + F.d, F.B @ (z - F.t) + F.E.T @ x
            slope, product, direction = F.A @ z + F.C @ x + F.b, F.A @ v + of_f[1], F.C.T @ v + of_f[0]
            losses = float(F.f(x, z)), float(F.g(x, z))
            x, z, v = x - 0.1 * direction, z - 0.5 * slope, v - 0.25 * product
        for name, value in {"x": x, "z": z, "v": v}.items():
            torch.testing.assert_close(session.values(name), value, rtol=1e-12, atol=1e-13)
    assert (metrics["upper_loss"], metrics["lower_loss"]) == (losses[0], losses[1])
