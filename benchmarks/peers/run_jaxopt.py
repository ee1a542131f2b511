"""jaxopt's gradient descent with implicit differentiation, and a plain jitted loop of F2SA; see `protocol` for the usage."""

# user code
from functools import partial

import jax
import jax.numpy as jnp
import jaxopt
from protocol import main

jax.config.update("jax_enable_x64", True)


def solve(lower, upper, d, s, record):
    # end
    if s["solver"] == "f2sa":
        return solve_f2sa(lower, upper, d, s, record)
    # user code
    cg = partial(jaxopt.linear_solve.solve_cg, maxiter=s["products"], tol=0.0)
    descent = jaxopt.GradientDescent(
        lambda y, x: lower(x, y), stepsize=s["lr_z"], maxiter=s["T"], tol=0.0, acceleration=False, implicit_diff_solve=cg
    )

    @jax.jit
    def step(x, y):
        def objective(x):
            solved = descent.run(y, x).params
            return upper(x, solved), solved

        slope, y = jax.grad(objective, has_aux=True)(x)
        return x - s["lr_x"] * slope, y

    x, y = d["x"], d["y"]
    # end
    jax.block_until_ready(step(x, y))
    record.restart()
    # user code
    for _ in range(s["steps"]):
        x, y = step(x, y)
        # end
        record(jax.block_until_ready(x))


def solve_f2sa(lower, upper, d, s, record):
    """No package: the loop of F2SA as one compiled step."""

    @jax.jit
    def step(x, y, z):
        def inner(_, yz):
            y, z = yz
            dy = jax.grad(lambda y: lower(x, y) + upper(x, y) / s["penalty"])(y)
            return y - s["lr_z"] * dy, z - s["lr_z"] * jax.grad(lower, 1)(x, z)

        y, z = jax.lax.fori_loop(0, s["T"], inner, (y, z))
        slope = jax.grad(lambda x: upper(x, y) + s["penalty"] * (lower(x, y) - lower(x, z)))(x)
        return x - s["lr_x"] * slope, y, z

    x, y, z = d["x"], d["y"], d["y"]
    jax.block_until_ready(step(x, y, z))
    record.restart()
    for _ in range(s["steps"]):
        x, y, z = step(x, y, z)
        record(jax.block_until_ready(x))


def logreg(d, s, record):
    # user code
    def lower(x, y):
        return jax.nn.softplus(-d["b"] * (d["a"] @ y)).mean() + 0.5 * (jnp.exp(x) * y**2).sum()

    def upper(x, y):
        return jax.nn.softplus(-d["c"] * (d["v"] @ y)).mean()

    solve(lower, upper, d, s, record)
    # end


def cleaning(d, s, record):
    def losses(weights, rows, labels):
        scores = jax.nn.log_softmax(rows @ weights[:, :-1].T + weights[:, -1])
        return -jnp.take_along_axis(scores, labels[:, None], axis=1)[:, 0]

    def lower(x, y):
        return (jax.nn.sigmoid(x) * losses(y, d["a"], d["b"])).mean() + 0.5 * d["ridge"] * (y[:, :-1] ** 2).sum()

    def upper(x, y):
        return losses(y, d["v"], d["c"]).mean()

    solve(lower, upper, d, s, record)


def quadratic(d, s, record):
    def lower(x, y):
        return y @ (0.5 * (d["A"] @ y) + d["C"] @ x + d["b"])

    def upper(x, y):
        return 0.5 * (y - d["t"]) @ (d["B"] @ (y - d["t"])) + x @ (d["E"] @ y + 0.5 * (d["D"] @ x) + d["d"])

    solve(lower, upper, d, s, record)


if __name__ == "__main__":
    main({"logreg": logreg, "cleaning": cleaning, "quadratic": quadratic}, jnp.asarray)
