"""Weights & Biases: every number of every step, the recipe as config, the result as summary, and the small files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal
from uuid import uuid4

from bilevel.errors import InputError
from bilevel.hookspecs import hookimpl
from bilevel.logger import Logger
from bilevel.loggers.content import ending, files_of, numbers_of, outcome_of
from bilevel.loggers.identity import keep, known_as, title_of

if TYPE_CHECKING:
    from bilevel.record import Record
    from bilevel.run import Run

EXIT_CODES = {"finished": 0, "failed": 1, "interrupted": 255}
"""Of the run, from which W&B tells its state; 255 is what its own library gives for Ctrl-C."""


@dataclass(frozen=True)
class Wandb(Logger):
    """Logs the run to Weights & Biases. The API key is that of `wandb login`, or of WANDB_API_KEY.

    project: the project; by default WANDB_PROJECT, or else bilevel.
    entity: the user or team that owns it; by default that of W&B's own settings.
    run_name: what the run is called; by default as its directory.
    group: runs of one group are shown together.
    tags: words by which the run is found.
    mode: whether to send the run, to keep it for `wandb sync`, or neither; by default WANDB_MODE, or else online.
    """

    name: Literal["wandb"] = "wandb"
    project: str | None = None
    entity: str | None = None
    run_name: str | None = None
    group: str | None = None
    tags: Sequence[str] = ()
    mode: Literal["online", "offline", "disabled"] | None = None

    requires: ClassVar[Mapping[str, str]] = {"wandb": "bilevel[wandb]"}

    def check(self) -> None:
        """See whether the package is there, and who is logged in: in the middle of a run nobody could be asked."""
        super().check()
        if (self.mode or os.environ.get("WANDB_MODE", "online")) != "online":
            return
        import wandb

        with suppress(wandb.CommError):  # a server that cannot be reached now may be reached later, and else is a warning
            try:
                wandb.login()
            except (wandb.UsageError, ValueError) as error:
                raise InputError(
                    f"wandb cannot log in: {error} Or set WANDB_API_KEY; `mode: offline` keeps the run for `wandb sync`"
                ) from error

    def follower(self) -> _Follower:
        """What logs one run."""
        return _Follower(self)


class _Follower:
    """Logs one run."""

    def __init__(self, settings: Wandb) -> None:
        self._settings = settings
        self._run: Any = None

    @hookimpl
    def bilevel_run_start(self, run: Run) -> None:
        """Begin the run, or go on with it."""
        import wandb

        settings = self._settings
        identity = known_as(run, "wandb") or {"id": uuid4().hex[:12]}
        offline = (settings.mode or os.environ.get("WANDB_MODE")) == "offline"
        self._run = wandb.init(
            project=settings.project or os.environ.get("WANDB_PROJECT") or "bilevel",
            entity=settings.entity,
            name=settings.run_name or title_of(run),
            group=settings.group,
            tags=list(settings.tags) or None,
            mode=settings.mode,
            config=dict(run.recipe),
            id=identity["id"],
            resume=None if offline else "allow",  # W&B warns of it where it has nobody to ask
            allow_val_change=True,  # of run.steps, in a run that is resumed
            dir=None if run.output is None or "WANDB_DIR" in os.environ else str(run.output),
            reinit="create_new",  # whatever else this process logs to W&B is left alone
            settings=wandb.Settings(console="off"),  # a live panel would be thousands of lines
        )
        keep(run, "wandb", identity)

    @hookimpl
    def bilevel_step_end(self, record: Record) -> None:
        """Log the step, unless it was before the run was resumed: the same numbers are there."""
        if record.step >= self._run.step:
            self._run.log(numbers_of(record), step=record.step)

    @hookimpl
    def bilevel_run_end(self, run: Run, error: BaseException | None) -> None:
        """Log what the run has come to, and its files, and end it."""
        if self._run is None:
            return
        try:
            outcome = outcome_of(run, error)
            self._run.summary.update({**outcome.numbers, **outcome.words})
            with files_of(run) as files:
                if files:
                    import wandb

                    artifact = wandb.Artifact(f"bilevel-{self._run.id}", type="bilevel-run")
                    for file in files:
                        artifact.add_file(str(file))
                    self._run.log_artifact(artifact)
        finally:
            self._run.finish(exit_code=EXIT_CODES[ending(error)])
