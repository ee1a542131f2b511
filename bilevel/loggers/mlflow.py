"""MLflow: every number of every step, the recipe as params, the result as metrics and tags, and the small files."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from threading import get_ident
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator

from bilevel.hookspecs import hookimpl
from bilevel.logger import Logger
from bilevel.loggers.content import ending, files_of, numbers_of, outcome_of
from bilevel.loggers.identity import keep, known_as, title_of
from bilevel.plain import flatten

if TYPE_CHECKING:
    from bilevel.record import Record
    from bilevel.run import Run

RETRIES = logging.getLogger("urllib3.connectionpool")

STATUS = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}

LONGEST_PARAM, LONGEST_TAG, LONGEST_NAME = 500, 5000, 250  # characters that every server takes; newer ones take more
PARAMS, METRICS = 100, 1000  # in one request
EVERY = 1.0  # seconds between two requests, so that quick steps share one
STEPPED = "seconds"  # a metric that every step has


def _without_password(uri: str | None) -> str | None:
    """The URI itself. Raises `ValueError` for one that must not be kept in a recipe."""
    if uri is not None and "@" in uri and urlsplit(uri).password is not None:
        raise ValueError(
            "there is a password in it, and recipes are kept and shared; give it by MLFLOW_TRACKING_URI, or by "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    return uri


@dataclass(frozen=True)
class MLflow(Logger):
    """Logs the run to MLflow. Who may do so, MLflow takes from its environment (MLFLOW_TRACKING_USERNAME, ..._TOKEN).

    experiment: the experiment, which is made if it is missing; by default MLFLOW_EXPERIMENT_NAME or MLFLOW_EXPERIMENT_ID, or
        else MLflow's Default.
    tracking_uri: a server or a database, without a password; by default MLFLOW_TRACKING_URI, or else what MLflow chooses.
    run_name: what the run is called; by default as its directory.
    tags: tags of the run.
    """

    name: Literal["mlflow"] = "mlflow"
    experiment: str | None = None
    tracking_uri: Annotated[str | None, AfterValidator(_without_password)] = None
    run_name: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)

    requires: ClassVar[Mapping[str, str]] = {"mlflow": "bilevel[mlflow]"}

    def follower(self) -> _Follower:
        """What logs one run."""
        return _Follower(self)


class _Follower:
    """Logs one run, by a client of its own: what else this process logs to MLflow is left alone."""

    def __init__(self, settings: MLflow) -> None:
        self._settings = settings
        self._client: Any = None
        self._id = ""
        self._done = -1  # the last step that MLflow has
        self._names: dict[str, str] = {}
        self._metrics: list[Any] = []  # that are not sent yet
        self._sent = 0.0
        self._thread = 0

    @hookimpl
    def bilevel_run_start(self, run: Run) -> None:
        """Begin the run, or go on with it."""
        from mlflow.tracking import MlflowClient

        self._thread = get_ident()
        RETRIES.addFilter(self._silence)
        self._client = MlflowClient(tracking_uri=self._settings.tracking_uri)
        self._id = self._found(known_as(run, "mlflow").get("run_id")) or self._created(run)
        keep(run, "mlflow", {"run_id": self._id})
        self._log_recipe(run)

    @hookimpl
    def bilevel_step_end(self, record: Record) -> None:
        """Log the step, unless it was before the run was resumed: the same numbers are there."""
        if record.step > self._done:
            self._add(numbers_of(record), record.step)
        if time.monotonic() - self._sent >= EVERY or len(self._metrics) >= METRICS:
            self._send()

    @hookimpl
    def bilevel_run_end(self, run: Run, error: BaseException | None) -> None:
        """Log what the run has come to, and its files, and end it."""
        try:
            if self._id:
                self._end(run, error)
        finally:
            RETRIES.removeFilter(self._silence)

    def _end(self, run: Run, error: BaseException | None) -> None:
        try:
            outcome = outcome_of(run, error)
            self._add(outcome.numbers, len(run.history))
            self._send()
            for key, value in outcome.words.items():
                self._client.set_tag(self._id, self._allowed(key), _cut(value, LONGEST_TAG))
            with files_of(run) as files:
                for file in files:
                    self._client.log_artifact(self._id, str(file))
        finally:
            self._client.set_terminated(self._id, STATUS[ending(error)])

    def _silence(self, record: logging.LogRecord) -> bool:
        """Leave out what is said of each of MLflow's many tries to reach a server; what comes of them is one warning."""
        return record.thread != self._thread

    def _found(self, known: str | None) -> str | None:
        """The run that this one goes on with, if MLflow still has it."""
        from mlflow.exceptions import MlflowException

        if known is None:
            return None
        try:
            found = self._client.get_run(known)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        if found.info.lifecycle_stage != "active":
            return None
        self._client.update_run(known, status="RUNNING")
        self._done = max((metric.step for metric in self._client.get_metric_history(known, STEPPED)), default=-1)
        return known

    def _created(self, run: Run) -> str:
        from mlflow.tracking.context.registry import resolve_tags

        name = self._settings.run_name or title_of(run)
        created = self._client.create_run(self._experiment(), run_name=name, tags=resolve_tags(dict(self._settings.tags)))
        return str(created.info.run_id)

    def _experiment(self) -> str:
        name = self._settings.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME")
        if name is None:
            return os.environ.get("MLFLOW_EXPERIMENT_ID", "0")
        found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id if found is not None else self._client.create_experiment(name))

    def _log_recipe(self, run: Run) -> None:
        """Log the recipe as params. Those of a run that is resumed are there, and cannot be changed."""
        from mlflow.entities import Param

        there = self._client.get_run(self._id).data.params
        settings = {self._allowed(key): _cut(str(value), LONGEST_PARAM) for key, value in flatten(run.recipe).items()}
        params = [Param(key, value) for key, value in settings.items() if key not in there]
        for begin in range(0, len(params), PARAMS):
            self._client.log_batch(self._id, params=params[begin : begin + PARAMS])

    def _add(self, numbers: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._metrics += [Metric(self._allowed(name), float(value), now, step) for name, value in numbers.items()]

    def _send(self) -> None:
        while self._metrics:
            some, self._metrics = self._metrics[:METRICS], self._metrics[METRICS:]
            self._client.log_batch(self._id, metrics=some)
        self._sent = time.monotonic()

    def _allowed(self, name: str) -> str:
        """A name as MLflow takes it: the name itself, wherever it is one. Different names stay different."""
        if name not in self._names:
            parts = (re.sub(r"[^\w.\- ]", "_", part)[:LONGEST_NAME] for part in name.split("/"))
            plain = "/".join("_" if part in ("", ".", "..") else part for part in parts)[:LONGEST_NAME]
            allowed, number = plain, 1
            while allowed in self._names.values():
                number += 1
                allowed = f"{plain[: LONGEST_NAME - 8]}-{number}"
            self._names[name] = allowed
        return self._names[name]


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
