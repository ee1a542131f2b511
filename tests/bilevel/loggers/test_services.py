"""A run is logged by the real packages, offline, and what they have written is read back. Run by `make test-loggers`."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from bilevel.record import Record, read_records
from tests.bilevel.loggers.offline_file import records

pytestmark = [
    pytest.mark.loggers,
    pytest.mark.filterwarnings("default"),  # what the packages warn about is not ours
]

LOGGERS = [
    {"name": "wandb", "mode": "offline", "project": "mixes"},
    {"name": "mlflow", "experiment": "mixes", "tags": {"by": "test"}},
    {"name": "trackio", "project": "mixes"},
]
PICTURED = {"account.json", "recipe.yaml", "weights.png", "report.html"}


class Place:
    """A folder in which runs are made, by the command line, with whatever the packages keep."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        mine = {
            "HOME": str(folder),
            "TRACKIO_DIR": str(folder / "trackio"),
            "HF_HUB_OFFLINE": "1",
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        }
        others = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "MLFLOW_", "TRACKIO_"))}
        self.environment = {**others, **mine}

    def run(self, *arguments: str, fails: bool = False) -> str:
        command = [sys.executable, "-m", "bilevel", "run", *arguments]
        done = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=300)
        assert (done.returncode != 0) == fails, done.stderr
        assert "logs no more" not in done.stderr
        return done.stdout + done.stderr

    def history(self, name: str) -> list[Record]:
        return read_records(self.folder / name / "metrics.jsonl")

    def mlflow(self, name: str) -> tuple[Any, Any]:
        """The client, and the run of that name."""
        from mlflow.tracking import MlflowClient

        client = MlflowClient(self.environment["MLFLOW_TRACKING_URI"])
        experiment = client.get_experiment_by_name("mixes")
        (found,) = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")
        return client, found

    def offline(self, name: str) -> list[list[Any]]:
        """The records of W&B's files of a run, one file for each time that it went on."""
        return [list(records(file)) for file in sorted((self.folder / name / "wandb").glob("offline-run-*/*.wandb"))]

    def trackio(self, name: str, query: str) -> list[Any]:
        """Rows of trackio's database of the project."""
        with sqlite3.connect(self.folder / "trackio" / "mixes.db") as database:
            kept = json.loads((self.folder / name / "loggers" / "trackio.json").read_text())
            return database.execute(query, (kept["name"],)).fetchall()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Has two runs: `mine`, of six steps and two more after a resume, and `lost`, whose numbers blow up."""
    place = Place(tmp_path_factory.mktemp("services"))
    recipe = {
        "problem": {"name": "ridge-reweighting"},
        "solver": {"name": "scalebio", "lr_x": 0.04, "lr_z": 0.01, "warmup": 2},
        "backend": {"name": "torch", "device": "cpu"},
        "run": {"steps": 6, "output": "mine", "loggers": LOGGERS},
    }
    (place.folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    place.run("recipe.yaml")
    place.run("--resume", "mine", "--set", "run.steps=8")
    wild = ("solver.optimizer_z={name: sgd}", "solver.lr_z=1e30", "run.steps=40")
    place.run("recipe.yaml", "--output", "lost", *(word for change in wild for word in ("--set", change)), fails=True)
    return place


def test_mlflow_has_every_number_of_every_step_once(place: Place) -> None:
    client, found = place.mlflow("mine")
    history = place.history("mine")
    assert len(history) == 8
    for name, of in {"lower_loss": lambda r: r.metrics["lower_loss"], "seconds": lambda r: r.seconds}.items():
        logged = client.get_metric_history(found.info.run_id, name)
        assert [(m.step, m.value) for m in logged] == [(r.step, of(r)) for r in history]
    for name in history[0].upper:
        logged = client.get_metric_history(found.info.run_id, f"upper/{name}")
        assert [m.value for m in logged] == [record.upper[name] for record in history]


def test_mlflow_has_recipe_result_files_and_state(place: Place) -> None:
    client, found = place.mlflow("mine")
    assert found.data.params["problem.name"] == "ridge-reweighting"
    assert found.data.params["run.loggers.0.name"] == "wandb"
    names = place.history("mine")[0].upper
    assert {f"result/{name}" for name in names} <= found.data.metrics.keys()
    assert found.data.tags["by"] == "test"
    assert {file.path for file in client.list_artifacts(found.info.run_id)} == PICTURED
    assert found.info.status == "FINISHED"


def test_mlflow_marks_a_run_that_failed(place: Place) -> None:
    _, found = place.mlflow("lost")
    assert found.info.status == "FAILED"
    assert "step" in found.data.tags["error"]


def test_wandb_has_every_number_of_every_step_once(place: Place) -> None:
    files = place.offline("mine")
    rows = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for file in files
        for record in file
        if record.WhichOneof("record_type") == "history"
    ]
    history = place.history("mine")
    assert len(files) == 2
    assert [row["_step"] for row in rows] == list(range(8))
    assert [row["lower_loss"] for row in rows] == [record.metrics["lower_loss"] for record in history]
    for name in history[0].upper:
        assert [row[f"upper/{name}"] for row in rows] == [record.upper[name] for record in history]


def test_wandb_has_recipe_result_files_and_state(place: Place) -> None:
    files = place.offline("mine")
    begun = [record.run for file in files for record in file if record.WhichOneof("record_type") == "run"]
    kept = json.loads((place.folder / "mine" / "loggers" / "wandb.json").read_text())
    assert {(run.run_id, run.project, run.display_name) for run in begun} == {(kept["id"], "mixes", "mine")}
    config = {item.key: json.loads(item.value_json) for item in begun[0].config.update}
    assert config["problem"]["name"] == "ridge-reweighting"
    summary = {
        item.key or "/".join(item.nested_key)
        for record in files[1]
        if record.WhichOneof("record_type") == "summary"
        for item in record.summary.update
    }
    assert {f"result/{name}" for name in place.history("mine")[0].upper} <= summary
    artifacts = [record.artifact for record in files[1] if record.WhichOneof("record_type") == "artifact"]
    assert {entry.path for entry in artifacts[0].manifest.contents} == PICTURED
    ends = [record.exit.exit_code for file in files for record in file if record.WhichOneof("record_type") == "exit"]
    assert ends == [0, 0]


def test_wandb_marks_a_run_that_failed(place: Place) -> None:
    (file,) = place.offline("lost")
    assert [record.exit.exit_code for record in file if record.WhichOneof("record_type") == "exit"] == [1]


def test_trackio_has_every_number_of_every_step_once(place: Place) -> None:
    rows = place.trackio("mine", "SELECT step, metrics FROM metrics WHERE run_name = ? ORDER BY id")
    logged = [(step, json.loads(metrics)) for step, metrics in rows]
    history = place.history("mine")
    steps = {step: numbers for step, numbers in logged if "lower_loss" in numbers}
    assert [step for step, numbers in logged if "lower_loss" in numbers] == list(range(8))
    assert [steps[record.step]["lower_loss"] for record in history] == [r.metrics["lower_loss"] for r in history]
    for name in history[0].upper:
        assert [steps[record.step][f"upper/{name}"] for record in history] == [record.upper[name] for record in history]
        assert f"result/{name}" in logged[-1][1]


def test_trackio_has_recipe_and_files(place: Place) -> None:
    manifests = place.trackio("mine", "SELECT manifest FROM artifact_versions WHERE producer_run_name = ? ORDER BY version")
    assert {Path(entry["path"]).name for entry in json.loads(manifests[-1][0])} == PICTURED
    ((config,),) = place.trackio("mine", "SELECT DISTINCT config FROM configs WHERE run_name = ?")
    assert json.loads(config)["problem"]["name"] == "ridge-reweighting"


def test_trackio_marks_a_run_that_failed(place: Place) -> None:
    alerts = place.trackio("lost", "SELECT title, level FROM alerts WHERE run_name = ?")
    assert alerts == [("run failed", "error")]
