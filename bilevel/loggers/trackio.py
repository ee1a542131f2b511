"""trackio: every number of every step, the recipe as config, the result as numbers and text, and the small files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal
from uuid import uuid4

from bilevel.hookspecs import hookimpl
from bilevel.logger import Logger
from bilevel.loggers.content import ending, files_of, numbers_of, outcome_of
from bilevel.loggers.identity import keep, known_as, title_of

if TYPE_CHECKING:
    from bilevel.record import Record
    from bilevel.run import Run


@dataclass(frozen=True)
class Trackio(Logger):
    """Logs the run to trackio: on this machine, or to a Space of Hugging Face with the token of `hf auth login` or HF_TOKEN.

    project: the project.
    run_name: what the run is called; by default as its directory. A few letters are added, as trackio tells runs by names.
    group: runs of one group are shown together.
    space_id: the Space; by default TRACKIO_SPACE_ID or TRACKIO_SERVER_URL, or else this machine.
    """

    name: Literal["trackio"] = "trackio"
    project: str = "bilevel"
    run_name: str | None = None
    group: str | None = None
    space_id: str | None = None

    requires: ClassVar[Mapping[str, str]] = {"trackio": "bilevel[trackio]"}

    def follower(self) -> _Follower:
        """What logs one run."""
        return _Follower(self)


class _Follower:
    """Logs one run."""

    def __init__(self, settings: Trackio) -> None:
        self._settings = settings
        self._run: Any = None

    @hookimpl
    def bilevel_run_start(self, run: Run) -> None:
        """Begin the run, or go on with it."""
        import matplotlib.figure  # noqa: F401  # trackio looks for it at every number, and trips over one that is half imported
        import trackio

        settings = self._settings
        title = settings.run_name or title_of(run) or "run"
        identity = known_as(run, "trackio") or {"name": f"{title}-{uuid4().hex[:6]}"}
        self._run = trackio.init(
            settings.project,
            name=identity["name"],
            group=settings.group,
            space_id=settings.space_id,
            config=dict(run.recipe),
            resume="allow",
            embed=False,  # a notebook has an output for the run already
        )
        keep(run, "trackio", identity)

    @hookimpl
    def bilevel_step_end(self, record: Record) -> None:
        """Log the step. What was done before the run was resumed is there twice, with the same numbers."""
        self._run.log(numbers_of(record), step=record.step)

    @hookimpl
    def bilevel_run_end(self, run: Run, error: BaseException | None) -> None:
        """Log what the run has come to, and its files, and end it; one that did not come to its end has an alert."""
        if self._run is None:
            return
        import trackio

        try:
            outcome = outcome_of(run, error)
            text = "\n\n".join(f"**{key}**: {value}" for key, value in outcome.words.items())
            said = {"outcome": trackio.Markdown(text)} if text else {}
            if outcome.numbers or said:
                self._run.log({**outcome.numbers, **said}, step=len(run.history))
            how = ending(error)
            if how != "finished":
                level = trackio.AlertLevel.ERROR if how == "failed" else trackio.AlertLevel.WARN
                self._run.alert(f"run {how}", outcome.words["error"], level=level, step=len(run.history))
            with files_of(run) as files:
                if files:
                    artifact = trackio.Artifact(f"{self._run.name}-files", type="bilevel-run")
                    for file in files:
                        artifact.add_file(str(file))
                    self._run.log_artifact(artifact)
        finally:
            self._run.finish()
