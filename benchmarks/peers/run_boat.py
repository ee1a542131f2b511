"""boat-torch with conjugate gradients; see `protocol` for the usage."""

import os

# user code
import boat_torch
import torch
import torch.nn.functional as F
from protocol import main


class Variable(torch.nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = torch.nn.Parameter(value.clone())

    def forward(self):
        return self.value.clone()


def solve(lower, upper, d, s, record, lower_data, upper_data):
    x, y = Variable(d["x"]), Variable(d["y"])
    config = {
        "fo_op": None,
        "gm_op": ["NGD"],
        "na_op": ["CG"],
        "lower_level_model": y,
        "upper_level_model": x,
        "lower_level_var": list(y.parameters()),
        "upper_level_var": list(x.parameters()),
        "lower_level_opt": torch.optim.SGD(y.parameters(), lr=s["lr_z"]),
        "upper_level_opt": torch.optim.SGD(x.parameters(), lr=s["lr_x"]),
        "lower_iters": s["T"],
        "device": "cpu",
        "accumulate_grad": False,
        "copy_last_param": True,
        "return_grad": False,
        "loss_log_path": os.devnull,
        "GDA": {"alpha_init": 0.0, "alpha_decay": 1.0},
        "RGT": {"truncate_iter": 0},
        "CG": {"k": s["products"], "tolerance": 0.0},
    }
    losses = {"lower_level_loss": {"function": f"__main__.{lower}"}, "upper_level_loss": {"function": f"__main__.{upper}"}}
    problem = boat_torch.Problem(config, losses)
    problem.build_ll_solver()
    problem.build_ul_solver()
    for step in range(s["steps"]):
        problem.run_iter(lower_data, upper_data, current_iter=step)
        # end
        record(x.value)


# user code
def logreg_lower(data, upper_model, lower_model, params=None):
    y = lower_model() if params is None else lower_model(params=params)
    return F.softplus(-data["labels"] * (data["rows"] @ y)).mean() + 0.5 * (upper_model().exp() * y**2).sum()


def logreg_upper(data, upper_model, lower_model, params=None):
    y = lower_model() if params is None else lower_model(params=params)
    return F.softplus(-data["labels"] * (data["rows"] @ y)).mean()


def logreg(d, s, record):
    upper_data, lower_data = {"rows": d["v"], "labels": d["c"]}, {"rows": d["a"], "labels": d["b"]}
    solve("logreg_lower", "logreg_upper", d, s, record, lower_data, upper_data)
    # end


def cleaning_losses(y, data):
    return F.cross_entropy(F.linear(data["rows"], y[:, :-1], y[:, -1]), data["labels"], reduction="none")


def cleaning_lower(data, upper_model, lower_model, params=None):
    y = lower_model() if params is None else lower_model(params=params)
    return (upper_model().sigmoid() * cleaning_losses(y, data)).mean() + 0.5 * data["ridge"] * (y[:, :-1] ** 2).sum()


def cleaning_upper(data, upper_model, lower_model, params=None):
    y = lower_model() if params is None else lower_model(params=params)
    return cleaning_losses(y, data).mean()


def cleaning(d, s, record):
    upper_data = {"rows": d["v"], "labels": d["c"]}
    lower_data = {"rows": d["a"], "labels": d["b"], "ridge": d["ridge"]}
    solve("cleaning_lower", "cleaning_upper", d, s, record, lower_data, upper_data)


def quadratic_lower(d, upper_model, lower_model, params=None):
    x, y = upper_model(), lower_model() if params is None else lower_model(params=params)
    return y @ (0.5 * (d["A"] @ y) + d["C"] @ x + d["b"])


def quadratic_upper(d, upper_model, lower_model, params=None):
    x, y = upper_model(), lower_model() if params is None else lower_model(params=params)
    return 0.5 * (y - d["t"]) @ (d["B"] @ (y - d["t"])) + x @ (d["E"] @ y + 0.5 * (d["D"] @ x) + d["d"])


def quadratic(d, s, record):
    solve("quadratic_lower", "quadratic_upper", d, s, record, d, d)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main({"logreg": logreg, "cleaning": cleaning, "quadratic": quadratic}, torch.from_numpy)
