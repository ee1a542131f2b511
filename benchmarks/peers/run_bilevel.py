"""This project, in memory; see `protocol` for the usage."""

from protocol import main

# user code
import torch
import torch.nn.functional as F

from bilevel import AID, F2SA, SOBA, Problem, fit
from bilevel_backends.torch_backend import TorchBackend

# end

SOLVERS = {
    # user code
    "soba": lambda s: SOBA(lr_x=s["lr_x"], lr_z=s["lr_z"]),
    # end
    "aid": lambda s: AID(lr_x=s["lr_x"], lr_z=s["lr_z"], lower_steps=s["T"], cg_steps=s["products"], cg_tolerance=None),
    "f2sa": lambda s: F2SA(lr_x=s["lr_x"], lr_z=s["lr_z"], lr_y=s["lr_z"], lower_steps=s["T"], penalty=s["penalty"]),
}


def solve(problem, s):
    # user code
    fit(problem, SOLVERS[s["solver"]](s), TorchBackend(device="cpu"), steps=s["steps"])
    # end


def logreg(d, s, record):
    # user code
    class Logreg(Problem):
        upper_data, lower_data = (d["v"], d["c"]), (d["a"], d["b"])

        def upper(self):
            return d["x"]

        def lower(self):
            return d["y"]

        def upper_loss(self, x, y, batch):
            features, labels = batch
            return F.softplus(-labels * (features @ y())).mean()

        def lower_loss(self, x, y, batch):
            return self.upper_loss(x, y, batch) + 0.5 * (x().exp() * y() ** 2).sum()

        # end
        def summary(self, x):
            record(x())
            return {}

    # user code
    solve(Logreg(), s)
    # end


def cleaning(d, s, record):
    class Cleaning(Problem):
        upper_data, lower_data = (d["v"], d["c"]), (d["a"], d["b"])

        def upper(self):
            return d["x"]

        def lower(self):
            return d["y"]

        def upper_loss(self, x, y, batch):
            weights = y()
            return F.cross_entropy(F.linear(batch[0], weights[:, :-1], weights[:, -1]), batch[1])

        def lower_loss(self, x, y, batch):
            weights = y()
            scores = F.linear(batch[0], weights[:, :-1], weights[:, -1])
            losses = F.cross_entropy(scores, batch[1], reduction="none")
            return (x().sigmoid() * losses).mean() + 0.5 * d["ridge"] * (weights[:, :-1] ** 2).sum()

        def summary(self, x):
            record(x())
            return {}

    solve(Cleaning(), s)


def quadratic(d, s, record):
    class Quadratic(Problem):
        upper_data = lower_data = None

        def upper(self):
            return d["x"]

        def lower(self):
            return d["y"]

        def upper_loss(self, x, y, batch):
            x, y = x(), y()
            return 0.5 * (y - d["t"]) @ (d["B"] @ (y - d["t"])) + x @ (d["E"] @ y + 0.5 * (d["D"] @ x) + d["d"])

        def lower_loss(self, x, y, batch):
            x, y = x(), y()
            return y @ (0.5 * (d["A"] @ y) + d["C"] @ x + d["b"])

        def summary(self, x):
            record(x())
            return {}

    solve(Quadratic(), s)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main({"logreg": logreg, "cleaning": cleaning, "quadratic": quadratic}, torch.from_numpy)
