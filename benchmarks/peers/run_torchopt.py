"""TorchOpt's implicit gradients with conjugate gradients; see `protocol` for the usage."""

# user code
import torch
import torch.nn.functional as F
import torchopt
from protocol import main
from torchopt.nn import ImplicitMetaGradientModule


def solve(objective, upper_loss, d, s, record):
    class Lower(ImplicitMetaGradientModule, linear_solve=torchopt.linear_solve.solve_cg(maxiter=s["products"], atol=0.0)):
        def __init__(self, x, y):
            super().__init__()
            self.x = x
            self.y = torch.nn.Parameter(y.clone())

        def objective(self):
            return objective(self.x, self.y)

        def solve(self):
            parameters = tuple(self.parameters())
            optimizer = torch.optim.SGD(parameters, lr=s["lr_z"])
            with torch.enable_grad():
                for _ in range(s["T"]):
                    optimizer.zero_grad()
                    self.objective().backward(inputs=parameters)
                    optimizer.step()
            return self

    x, y = d["x"].clone().requires_grad_(), d["y"]
    optimizer = torch.optim.SGD([x], lr=s["lr_x"])
    for _ in range(s["steps"]):
        solved = Lower(x, y).solve()
        optimizer.zero_grad()
        upper_loss(x, solved.y).backward()
        optimizer.step()
        y = solved.y.detach()
        # end
        record(x)


def logreg(d, s, record):
    # user code
    def lower(x, y):
        return F.softplus(-d["b"] * (d["a"] @ y)).mean() + 0.5 * (x.exp() * y**2).sum()

    def upper(x, y):
        return F.softplus(-d["c"] * (d["v"] @ y)).mean()

    solve(lower, upper, d, s, record)
    # end


def cleaning(d, s, record):
    def losses(weights, rows, labels):
        return F.cross_entropy(F.linear(rows, weights[:, :-1], weights[:, -1]), labels, reduction="none")

    def lower(x, y):
        return (x.sigmoid() * losses(y, d["a"], d["b"])).mean() + 0.5 * d["ridge"] * (y[:, :-1] ** 2).sum()

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
    torch.set_num_threads(1)
    main({"logreg": logreg, "cleaning": cleaning, "quadratic": quadratic}, torch.from_numpy)
