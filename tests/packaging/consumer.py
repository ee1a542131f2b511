"""What a user's own code looks like to a type checker; see check_wheel.py."""

from bilevel_calibration.problem import Calibration

from bilevel import LISA, SGD, Cosine, Result, ScaleBiO, fit
from bilevel_backends.plugin import bilevel_backends
from bilevel_backends.torch_backend import TorchBackend
from bilevel_problems.plugin import bilevel_problems

problem = Calibration(readings=(1.0, 2.0), references=(3.0,))
solver = ScaleBiO(penalty=100.0, lr_x=Cosine(peak=0.1, steps=10), optimizer_x=SGD(), warmup=0)
result: Result = fit(problem, solver, TorchBackend(device="cpu"), steps=10, active=LISA(blocks=1))
offset: float = float(result.x["value"])
hooks = (bilevel_problems, bilevel_backends)

# Were the types lost on the way, nothing would be left to complain about here, and the comment an error of its own.
fit(problem, solver, TorchBackend(), steps="ten")  # type: ignore[arg-type]
