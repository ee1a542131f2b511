"""What W&B is given, by a fake; `test_services.py` reads back what the real one has written."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bilevel import InputError, NonFiniteError, ScaleBiO, fit
from bilevel.loggers.wandb import Wandb
from bilevel.loop import Interrupted
from bilevel.plugins import Plugins
from bilevel_backends.torch_backend import TorchBackend
from tests.bilevel.loggers.fakes import fake_wandb
from tests.conftest import Distance


@pytest.fixture(autouse=True)
def wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "wandb", fake := fake_wandb())
    return fake


def run(output: Path | None, *, steps: int = 4, **fields: Any) -> Any:
    fields = {"solver": ScaleBiO(lr_x=0.04, lr_z=0.3), "loggers": [Wandb()], **fields}
    return fit(Distance(), backend=TorchBackend(device="cpu"), steps=steps, output=output, **fields)


def test_every_number_the_recipe_the_result_and_the_files_are_logged(wandb: Any, tmp_path: Path, plugins: Plugins) -> None:
    result = run(tmp_path / "mine", observer=plugins.hooks, recipe={"problem": {"name": "distance"}, "run": {"seed": 0}})
    (logged,) = wandb.runs
    assert logged.settings["name"] == "mine"
    assert logged.settings["project"] == "bilevel"
    assert logged.settings["config"] == {"problem": {"name": "distance"}, "run": {"seed": 0}}
    assert [step for step, _ in logged.logged] == [0, 1, 2, 3]
    assert [numbers["upper/x0"] for _, numbers in logged.logged] == [record.upper["x0"] for record in result.history]
    assert {"lower_loss", "seconds", "size"} <= logged.logged[0][1].keys()
    assert logged.summary["result/x0"] == pytest.approx(sum(record.upper["x0"] for record in result.history[-2:]) / 2)
    assert logged.files.keys() == {"account.json", "recipe.yaml", "weights.png", "report.html"}
    assert logged.files["weights.png"] == (tmp_path / "mine" / "weights.png").read_bytes()
    assert logged.exit_code == 0


def test_the_settings_are_those_of_the_recipe(wandb: Any, tmp_path: Path) -> None:
    logger = Wandb(project="mixes", entity="us", run_name="first", group="seeds", tags=["a"], mode="offline")
    run(tmp_path / "run", loggers=[logger])
    settings = wandb.runs[0].settings
    given = {"project": "mixes", "entity": "us", "name": "first", "group": "seeds", "tags": ["a"], "mode": "offline"}
    assert {key: settings[key] for key in given} == given


def test_a_resumed_run_goes_on_in_the_same_run_and_repeats_no_step(wandb: Any, tmp_path: Path) -> None:
    class Break:
        def bilevel_run_start(self, *, run: Any) -> None: ...

        def bilevel_step_end(self, *, run: Any, record: Any) -> None:
            if record.step == 4:
                raise ConnectionError("killed")

        def bilevel_run_end(self, *, run: Any, error: Any) -> None: ...

    with pytest.raises(ConnectionError):
        run(tmp_path / "run", steps=8, checkpoint_every=3, observer=Break())
    run(tmp_path / "run", steps=8, checkpoint_every=3, resume=True)
    first, second = wandb.runs
    assert first.id == second.id == json.loads((tmp_path / "run" / "loggers" / "wandb.json").read_text())["id"]
    assert second.settings["resume"] == "allow"
    assert [step for each in wandb.runs for step, _ in each.logged] == list(range(8))
    assert (first.exit_code, second.exit_code) == (1, 0)
    assert first.summary["error"] == "killed"


def test_runs_are_told_apart(wandb: Any, tmp_path: Path) -> None:
    for name in ("one", "two"):
        run(tmp_path / name)
    assert len({logged.id for logged in wandb.runs}) == 2


def test_a_run_that_fails_is_told_as_one(wandb: Any, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError) as caught:
        run(tmp_path / "run", steps=200, solver=ScaleBiO(lr_x=0.04, lr_z=1e200))
    assert wandb.runs[0].exit_code == 1
    assert wandb.runs[0].summary["error"] == str(caught.value)


def test_a_run_that_is_interrupted_is_told_as_one(wandb: Any, tmp_path: Path) -> None:
    class Stop:
        def bilevel_run_start(self, *, run: Any) -> None: ...

        def bilevel_step_end(self, *, run: Any, record: Any) -> None:
            raise Interrupted("stopped after 1 of 4 steps")

        def bilevel_run_end(self, *, run: Any, error: Any) -> None: ...

    with pytest.raises(Interrupted):
        run(tmp_path / "run", observer=Stop())
    assert wandb.runs[0].exit_code == 255


def test_nobody_to_log_in_as_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(fails="UsageError"))
    with pytest.raises(InputError, match="wandb cannot log in: No API key configured.*WANDB_API_KEY.*offline"):
        run(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    run(tmp_path / "run", loggers=[Wandb(mode="offline")])


def test_a_server_that_cannot_be_reached_at_the_start_does_not_fail_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", fake := fake_wandb(fails="CommError"))
    run(None)
    assert len(fake.runs[0].logged) == 4


def test_a_run_without_a_directory_is_logged_and_keeps_nothing(wandb: Any) -> None:
    run(None)
    assert len(wandb.runs[0].logged) == 4
    assert wandb.runs[0].files == {}
