from importlib.metadata import EntryPoint

from bilevel import AID, fit
from bilevel.plugins import load_plugins
from bilevel.testing.contract import check_problem
from bilevel_backends.torch_backend import TorchBackend
from bilevel_calibration.problem import Calibration


def test_the_problem_keeps_the_contract() -> None:
    check_problem(Calibration(ridge=0.25))


def test_a_run_ends_at_the_solution() -> None:
    result = fit(Calibration(ridge=0.25), AID(lr_x=0.5, lr_z=1.0), TorchBackend(device="cpu"), steps=30)
    assert abs(float(result.x["value"]) - (4.0 - 2.0) / (1 + 0.25)) < 1e-4


def test_the_plugin_registers_the_problem() -> None:
    plugins = load_plugins([EntryPoint("calibration", "bilevel_calibration", "bilevel")])
    assert plugins.find("problems", "calibration").load() is Calibration
