"""What MLflow is sent, by a fake; `test_services.py` reads back what the real one has written."""

import json
import logging
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bilevel import InputError, NonFiniteError, ScaleBiO, fit
from bilevel.loggers.mlflow import LONGEST_PARAM, MLflow
from bilevel_backends.torch_backend import TorchBackend
from tests.bilevel.loggers.fakes import package
from tests.conftest import Distance

Param = namedtuple("Param", "key value")
Metric = namedtuple("Metric", "key value timestamp step")


class MlflowException(Exception):
    error_code = "RESOURCE_DOES_NOT_EXIST"


class Server:
    """Keeps runs as MLflow does, and has its limits: params that never change, so many a request, names of some letters."""

    def __init__(self) -> None:
        self.runs: dict[str, Any] = {}
        self.experiments: dict[str, str] = {}
        self.requests = 0

    def __call__(self, tracking_uri: str | None) -> Any:
        self.tracking_uri = tracking_uri
        return self

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(experiment_id=self.experiments[name]) if name in self.experiments else None

    def create_experiment(self, name: str) -> str:
        return self.experiments.setdefault(name, str(len(self.experiments) + 1))

    def create_run(self, experiment: str, run_name: str, tags: dict[str, str]) -> Any:
        info = SimpleNamespace(run_id=f"run{len(self.runs)}", lifecycle_stage="active", status="RUNNING", name=run_name)
        data = SimpleNamespace(params={}, tags=dict(tags), metrics=[])
        run = SimpleNamespace(info=info, data=data, experiment=experiment, files=set())
        self.runs[info.run_id] = run
        return run

    def get_run(self, run_id: str) -> Any:
        if run_id not in self.runs:
            raise MlflowException
        return self.runs[run_id]

    def get_metric_history(self, run_id: str, key: str) -> list[Metric]:
        return [metric for metric in self.runs[run_id].data.metrics if metric.key == key]

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        self.requests += 1
        assert len(metrics) <= 1000
        assert len(params) <= 100
        data = self.runs[run_id].data
        for param in params:
            assert len(param.value) <= 500
            assert data.params.setdefault(param.key, param.value) == param.value
        for item in (*metrics, *params):
            assert set(item.key) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-. /é"), item.key
            assert len(item.key) <= 250
            assert not {"", ".", ".."} & set(item.key.split("/"))
        data.metrics += metrics

    def set_tag(self, run_id: str, key: str, value: str) -> None:
        self.runs[run_id].data.tags[key] = value

    def log_artifact(self, run_id: str, path: str) -> None:
        self.runs[run_id].files.add(Path(path).name)

    def update_run(self, run_id: str, status: str) -> None:
        self.runs[run_id].info.status = status

    set_terminated = update_run


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    for name, members in {
        "mlflow": {},
        "mlflow.tracking": {"MlflowClient": server},
        "mlflow.entities": {"Metric": Metric, "Param": Param},
        "mlflow.exceptions": {"MlflowException": MlflowException},
        "mlflow.tracking.context": {},
        "mlflow.tracking.context.registry": {"resolve_tags": lambda tags: tags},
    }.items():
        monkeypatch.setitem(sys.modules, name, package(name, **members))
    return server


class Odd(Distance):
    """Has names that MLflow does not take, two of which would become the same."""

    def summary(self, x: Any) -> dict[str, float]:
        return dict(zip(("Books & co", "Books $ co", "../é"), map(float, x()), strict=True))


def run(output: Path, *, steps: int = 4, problem: Any = None, logger: MLflow | None = None, **fields: Any) -> Any:
    solver = fields.pop("solver", ScaleBiO(lr_x=0.04, lr_z=0.3))
    problem, loggers = problem or Distance(), [logger or MLflow()]
    return fit(problem, solver, TorchBackend(device="cpu"), steps=steps, output=output, loggers=loggers, **fields)


def test_every_number_is_logged_once_also_by_a_run_that_is_resumed(server: Server, tmp_path: Path) -> None:
    class Break:
        def bilevel_run_start(self, *, run: Any) -> None: ...

        def bilevel_step_end(self, *, run: Any, record: Any) -> None:
            if record.step == 4:
                raise ConnectionError("killed")

        def bilevel_run_end(self, *, run: Any, error: Any) -> None: ...

    with pytest.raises(ConnectionError):
        run(tmp_path / "run", steps=8, checkpoint_every=3, observer=Break())
    assert server.runs["run0"].info.status == "FAILED"
    result = run(tmp_path / "run", steps=8, checkpoint_every=3, resume=True)
    (only,) = server.runs.values()
    assert only.info.run_id == json.loads((tmp_path / "run" / "loggers" / "mlflow.json").read_text())["run_id"]
    assert [m.step for m in server.get_metric_history("run0", "seconds")] == list(range(8))
    logged = [m.value for m in server.get_metric_history("run0", "upper/x0")]
    assert logged == [record.upper["x0"] for record in result.history]
    assert only.info.status == "FINISHED"


def test_a_run_that_mlflow_has_no_more_is_begun_anew(server: Server, tmp_path: Path) -> None:
    run(tmp_path / "run")
    server.runs["other"] = server.runs.pop("run0")
    run(tmp_path / "run", steps=6, resume=True)
    assert server.runs.keys() == {"other", "run1"}


def test_a_recipe_of_any_size_is_logged_within_the_limits(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = {"problem": {"sources": [{"path": f"{i}/" + "x" * 600} for i in range(250)]}, "run": {"steps": 4}}
    run(tmp_path / "run", recipe=recipe)
    params = server.runs["run0"].data.params
    assert len(params) == 251
    assert params["problem.sources.7.path"] == "7/" + "x" * (LONGEST_PARAM - 3) + "…"
    run(tmp_path / "run", recipe={**recipe, "run": {"steps": 6}}, steps=6, resume=True)  # a param cannot be changed
    assert len(server.get_metric_history("run0", "seconds")) == 6
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_names_that_mlflow_does_not_take_stay_different(server: Server, tmp_path: Path) -> None:
    result = run(tmp_path / "run", problem=Odd())
    for name, key in (("Books & co", "Books _ co"), ("Books $ co", "Books _ co-2"), ("../é", "_/é")):
        logged = [m.value for m in server.get_metric_history("run0", f"upper/{key}")]
        assert logged == [record.upper[name] for record in result.history]


def test_quick_steps_share_a_request(server: Server, tmp_path: Path) -> None:
    run(tmp_path / "run", steps=100)
    assert len(server.get_metric_history("run0", "seconds")) == 100
    assert server.requests < 20


def test_experiment_and_server_are_those_of_the_recipe_or_of_the_environment(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "default")
    run(tmp_path / "named", logger=MLflow(experiment="mixes", tracking_uri="http://host", run_name="first", tags={"a": "b"}))
    assert server.tracking_uri == "http://host"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mixes")
    run(tmp_path / "environment")
    assert [run.experiment for run in server.runs.values()] == ["0", "1", "1"]
    assert [run.info.name for run in server.runs.values()] == ["default", "first", "environment"]
    assert server.runs["run1"].data.tags["a"] == "b"


def test_a_run_that_fails_is_marked_and_its_files_are_there(server: Server, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError) as caught:
        run(tmp_path / "run", steps=200, solver=ScaleBiO(lr_x=0.04, lr_z=1e200))
    failed = server.runs["run0"]
    assert failed.info.status == "FAILED"
    assert failed.data.tags["error"] == str(caught.value)
    assert failed.files == {"account.json", "recipe.yaml", "report.html"}


def test_a_password_is_not_kept_in_a_recipe() -> None:
    with pytest.raises(InputError, match="MLflow.tracking_uri.*MLFLOW_TRACKING_PASSWORD"):
        MLflow(tracking_uri="https://me:secret@host")
    assert MLflow(tracking_uri="https://me@host").tracking_uri == "https://me@host"


def test_a_server_that_is_down_is_one_warning_and_not_one_for_each_try(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    retries = logging.getLogger("urllib3.connectionpool")

    def down(*arguments: Any, **named: Any) -> Any:
        retries.warning("Retrying")
        raise ConnectionError("refused")

    monkeypatch.setattr(server, "create_run", down)
    result = run(tmp_path / "run")
    retries.warning("of somebody else")
    assert len(result.history) == 4
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert said == ["mlflow logs no more of this run: ConnectionError: refused", "of somebody else"]
    assert not retries.filters
