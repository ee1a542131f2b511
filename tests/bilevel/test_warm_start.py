"""A run begins from the last state of another one, as far as that fits, and says what was taken over."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from bilevel import SGD, Problem, Result, ScaleBiO, fit
from bilevel.config import load_config
from bilevel.errors import InputError
from bilevel.plugins import Plugins
from bilevel_backends.torch_backend import TorchBackend
from tests.conftest import Distance

TOY = """
problem: {name: quadratic, m: 2, n: 3}
solver: {name: scalebio, warmup: 0}
backend: {name: torch, device: cpu}
run: {steps: 3, output: first}
"""


def run(problem: Problem[Any], solver: Any = None, **settings: Any) -> Result:
    solver = solver or ScaleBiO(penalty=5.0, lr_x=0.04, lr_z=0.3, optimizer_x=SGD(), optimizer_z=SGD(), warmup=0)
    return fit(problem, solver, TorchBackend(device="cpu"), **{"steps": 3, **settings})


@pytest.fixture
def first(tmp_path: Path) -> Path:
    run(Distance(), output=tmp_path / "first")
    return tmp_path / "first"


def test_a_run_that_begins_from_another_goes_on_where_that_ended(first: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "bilevel")
    whole = run(Distance(), steps=6)
    second = run(Distance(), warm_start=first)
    for name, value in whole.x.items():  # plain gradient descent on all data has no other state
        torch.testing.assert_close(second.x[name], value)
    assert f"begins from {first}, as it was after 3 steps: x, y and z are taken over" in caplog.text


class Wider(Distance):
    """With an upper variable of other names, and the lower variable as before."""

    def summary(self, x: Any) -> dict[str, float]:
        return {f"other {name}": value for name, value in super().summary(x).items()}


def test_what_does_not_fit_is_left_as_the_recipe_has_it_and_said(first: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "bilevel")
    start = run(Wider(), steps=1).history[0].upper
    begun = run(Wider(), steps=1, warm_start=first)
    assert "y and z are taken over; x is not, as its entries are x0" in caplog.text
    assert begun.history[0].metrics["lower_loss"] != run(Wider(), steps=1).history[0].metrics["lower_loss"]
    assert start.keys() == begun.history[0].upper.keys()


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda first: first / "nowhere", "there is no run in"),
        (lambda first: _without_checkpoints(first), "it has no checkpoint"),
        (lambda first: _damaged(first), "has 7 bytes, and was written with"),
    ],
    ids=["no run", "no checkpoint", "damaged"],
)
def test_a_run_that_cannot_be_begun_from_is_refused_before_anything_is_written(
    first: Path, prepare: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        run(Distance(), warm_start=prepare(first), output=tmp_path / "second")
    assert not (tmp_path / "second" / "recipe.yaml").exists()


def _without_checkpoints(first: Path) -> Path:
    (first / "checkpoints").rename(first / "gone")
    return first


def _damaged(first: Path) -> Path:
    (file,) = (first / "checkpoints").rglob("z-*.safetensors")
    file.write_bytes(b"nothing")
    return first


def test_a_setting_of_the_recipe_says_what_a_run_began_from_and_a_resumed_one_does_not_need_it(
    plugins: Plugins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(TOY)
    load_config(Path("recipe.yaml"), plugins).fit()
    changes = ["run.warm_start=first", "run.output=second", "solver.penalty=7"]
    load_config(Path("recipe.yaml"), plugins, changes=changes).fit()
    assert "warm_start: first" in Path("second/recipe.yaml").read_text()
    Path("first").rename("gone")
    resumed = load_config(Path("recipe.yaml"), plugins, changes=[*changes, "run.steps=4"])
    assert len(resumed.fit(resume=True).history) == 4
