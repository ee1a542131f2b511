"""betty-ml with conjugate gradients, or with a Neumann series; see `protocol` for the usage."""

# user code
import torch
import torch.nn.functional as F
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem
from protocol import main


class Variable(torch.nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = torch.nn.Parameter(value.clone())


def solve(Upper, Lower, d, s, upper_data, lower_data):
    x, y = Variable(d["x"]), Variable(d["y"])
    upper = Upper(
        name="upper",
        module=x,
        optimizer=torch.optim.SGD(x.parameters(), lr=s["lr_x"]),
        train_data_loader=[upper_data],
        config=Config(retain_graph=True),
    )
    lower = Lower(
        name="lower",
        module=y,
        optimizer=torch.optim.SGD(y.parameters(), lr=s["lr_z"]),
        train_data_loader=[lower_data],
        config=Config(
            type=s["solver"],
            cg_iterations=s["products"],
            neumann_iterations=s["products"],
            neumann_alpha=s["lr_z"],
            unroll_steps=s["T"],
        ),
    )
    dependencies = {"u2l": {upper: [lower]}, "l2u": {lower: [upper]}}
    steps = s["T"] * s["steps"]
    config = EngineConfig(train_iters=steps, valid_step=steps + 1)
    Engine(config=config, problems=[upper, lower], dependencies=dependencies).run()
    # end


def logreg(d, s, record):
    # user code
    class Upper(ImplicitProblem):
        def training_step(self, batch):
            features, labels = batch
            return F.softplus(-labels * (features @ self.lower.module.value)).mean()

        # end
        def param_callback(self):
            record(self.module.value)

    # user code
    class Lower(ImplicitProblem):
        def training_step(self, batch):
            features, labels = batch
            y, x = self.module.value, self.upper.module.value
            return F.softplus(-labels * (features @ y)).mean() + 0.5 * (x.exp() * y**2).sum()

    solve(Upper, Lower, d, s, (d["v"], d["c"]), (d["a"], d["b"]))
    # end


def cleaning(d, s, record):
    class Upper(ImplicitProblem):
        def training_step(self, batch):
            weights = self.lower.module.value
            return F.cross_entropy(F.linear(batch[0], weights[:, :-1], weights[:, -1]), batch[1])

        def param_callback(self):
            record(self.module.value)

    class Lower(ImplicitProblem):
        def training_step(self, batch):
            weights, x = self.module.value, self.upper.module.value
            scores = F.linear(batch[0], weights[:, :-1], weights[:, -1])
            losses = F.cross_entropy(scores, batch[1], reduction="none")
            return (x.sigmoid() * losses).mean() + 0.5 * d["ridge"] * (weights[:, :-1] ** 2).sum()

    solve(Upper, Lower, d, s, (d["v"], d["c"]), (d["a"], d["b"]))


def quadratic(d, s, record):
    class Upper(ImplicitProblem):
        def training_step(self, batch):
            x, y = self.module.value, self.lower.module.value
            return 0.5 * (y - d["t"]) @ (d["B"] @ (y - d["t"])) + x @ (d["E"] @ y + 0.5 * (d["D"] @ x) + d["d"])

        def param_callback(self):
            record(self.module.value)

    class Lower(ImplicitProblem):
        def training_step(self, batch):
            x, y = self.upper.module.value, self.module.value
            return y @ (0.5 * (d["A"] @ y) + d["C"] @ x + d["b"])

    solve(Upper, Lower, d, s, (torch.zeros(1),), (torch.zeros(1),))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main({"logreg": logreg, "cleaning": cleaning, "quadratic": quadratic}, torch.from_numpy)
