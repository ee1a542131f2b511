"""A plan for the machine at hand: its free memory, and the speed of this model's own operations."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_flatten
from typer.testing import CliRunner

from bilevel import SGD, All
from bilevel.cli import app, main
from bilevel.errors import InputError
from bilevel.planning import here
from bilevel.planning.footprint import Footprint
from bilevel.planning.hardware import GB
from bilevel.planning.here import measure
from bilevel.planning.load import Setup, loads
from bilevel.planning.plan import make_plan
from bilevel.solver import Workload
from bilevel_backends.torch_backend import TorchBackend
from tests.bilevel.planning.small import small_cost

RECIPE = """
problem: {name: hyper-cleaning, rows: 40}
solver: {name: f3sa}
backend: {name: torch, device: cpu}
run: {steps: 120, output: out}
"""


@pytest.fixture
def setup() -> Setup:
    return Setup(TorchBackend(device="cpu"), All(), Workload({"y": SGD()}, lower_passes=2, upper_passes=1))


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return "recipe.yaml"


def test_a_step_takes_as_long_as_its_operations(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(here._Call, "seconds", lambda call, device: 1e-3)
    model = Footprint(small_cost(), None)
    plan = make_plan(model, setup, measure(model, setup))
    draw = setup.active.heaviest(model.blocks, model.sizes)[0]
    passes = loads(setup.workload, model.cost, plan.placement)
    called = sum(load.micro_batches * load.traced(model, draw, recompute=False).operations for load in passes)
    assert called > 20
    assert plan.step_seconds == pytest.approx(1e-3 * called)


def test_products_that_were_not_timed_are_as_fast_as_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    timed, late, plain = (here._Call(name, (), None) for name in ("timed", "late", "plain"))
    calls = here._Calls()
    calls.counts.update({timed: 3, late: 2, plain: 10})
    calls.flops.update({timed: 400, late: 100, plain: 0})
    monkeypatch.setattr(here._Call, "seconds", lambda call, device: {timed: 0.4, late: None, plain: 0.1}[call])
    as_fast = 1 + 2 * 100 / (3 * 400)
    assert calls.seconds(torch.device("cpu"), room=1) == pytest.approx((3 * 0.4 + 10 * 0.1) * as_fast)


def test_what_has_no_room_is_not_tried() -> None:
    shape = here._Shape((1000,), (1,), torch.float32)
    calls = here._Calls()
    calls.counts[here._Call(lambda tensor: pytest.fail("it was called"), (shape,), tree_flatten(((0,), {}))[1])] = 1
    calls.flops = dict.fromkeys(calls.counts, 1)
    assert calls.seconds(torch.device("cpu"), room=15_999) == 0


def test_real_operations_are_timed(setup: Setup) -> None:
    machine = measure(Footprint(small_cost(), None), setup)
    assert 0 < machine.peak_tflops < 1e3
    assert 1e-8 < machine.launch < 1
    assert machine.on_cpu


def test_the_command_plans_for_this_machine(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(here, "free_memory", lambda: 4 * 10**9)
    done = CliRunner().invoke(app, ["plan", recipe, "--here", "--json", "plan.json"])
    assert done.exit_code == 0, done.output
    found = json.loads(Path("plan.json").read_text())
    assert found["hardware"]["measured"]
    assert found["step_seconds"] > 0
    assert "of the 4.0 GB that are free" in done.output
    assert "120 steps take about" in done.output
    assert "GPU" not in done.output


@pytest.mark.parametrize("missing", [0, 10**6])
def test_all_that_a_run_holds_has_to_fit_into_what_is_free(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, missing: int
) -> None:
    model = Footprint(small_cost(), None)
    needed = make_plan(model, setup, measure(model, setup))
    room = needed.gpu_bytes + needed.cpu_bytes - missing
    monkeypatch.setattr(here, "free_memory", lambda: room)
    machine = measure(Footprint(small_cost(), None), setup)
    assert machine.gpu_memory * GB == pytest.approx(room)
    assert make_plan(model, setup, machine).fits == (missing == 0)


def test_a_machine_that_does_not_say_what_is_free_is_an_error(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(here, "free_memory", lambda: None)
    with pytest.raises(InputError, match="plan with --gpu-memory instead of --here"):
        measure(Footprint(small_cost(), None), setup)


def test_a_machine_is_measured_or_described(
    recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["bilevel", "plan", recipe, "--here", "--gpus", "2"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "--here measures this machine" in capsys.readouterr().err
