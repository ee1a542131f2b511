"""The result of a reweighting run, for Python: its weights, whether to trust them, and what can be made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from bilevel.account import Account, Finding, Verdict
from bilevel.config import Config, load_config
from bilevel.errors import InputError
from bilevel.loop import Interrupted, Observer
from bilevel.plugins import load_plugins
from bilevel.recipe import Recipe
from bilevel.record import Record
from bilevel.report.page import Report, check_output, read, write
from bilevel.run_directory import RunDirectory
from bilevel.run_reader import SavedRun, read_run
from bilevel.working_directory import entered
from bilevel_llm.api.summary import as_html, as_text
from bilevel_llm.exporters.run import check_free, export
from bilevel_llm.exporters.run import write as write_files
from bilevel_llm.exporters.weighted_data import Stop
from bilevel_llm.mixing.draw import MAX_REPEATS, make_mix
from bilevel_llm.mixing.mix import AS_THEY_ARE, OnShortfall
from bilevel_llm.reweighting.saved_run import read_run as read_weights
from bilevel_llm.reweighting.saved_run import weights_of

if TYPE_CHECKING:
    from datasets import Dataset

    from bilevel.report.drawing import Chart

PROGRESS = ("bilevel_progress", "bilevel_notebook")
"""The plugins that show a run while it goes on."""


class Reweighting:
    """The result of a reweighting run, as its directory has it.

    directory: the run directory.

    Raises `InputError` if there is no such run, or if it has not done a step.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        recipe = read_run(directory).recipe.get("problem") if directory.is_dir() else None
        if not isinstance(recipe, Mapping) or "sources" not in recipe:
            raise InputError(f"{directory} is not the directory of a run of llm-reweighting")
        if not self._run.history:
            raise InputError(f"{directory}: the run has not done a step, so that there are no weights yet")

    @property
    def weights(self) -> dict[str, float]:
        """Source -> its weight: what the run comes to; see `bilevel.record.average`. They sum to 1."""
        return dict(self._run.average)

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """Source -> the 95% interval of its weight; empty as long as there is too little evidence for any."""
        return dict(self._account.intervals)

    @property
    def verdict(self) -> Verdict | None:
        """Whether to use the weights, to run longer, or neither, and why."""
        return self._account.verdict

    @property
    def findings(self) -> Sequence[Finding]:
        """What to know before using the weights."""
        return self._account.findings

    @property
    def history(self) -> Sequence[Record]:
        """The record of every step."""
        return self._run.history

    @property
    def recipe(self) -> Recipe:
        """The recipe of the run, every default filled in; `recipe.save(file)` writes it for `bilevel run`."""
        return Recipe.read(RunDirectory(self.directory).recipe_file)

    def extend(self, steps: int | None = None, *, progress: bool = True) -> Reweighting:
        """Continue the run, exactly as if it had never stopped, and return its result.

        steps: the total number of steps. None: as many as were planned; if these are done, as many as the verdict asks for.

        Raises `InputError` if neither says how many, and whatever `bilevel.fit` raises.
        """
        recipe = self.recipe
        if steps is None and self._run.complete:
            steps = self.verdict.steps if self.verdict is not None else None
            if steps is None:
                raise InputError("the run is complete, and its verdict is not to run longer; give steps, the number in all")
        if steps is not None:
            recipe.put("run.steps", steps, "steps")
        with entered(self.directory) as place:
            recipe.put("run.output", str(place.run or self.directory), "the directory of the run")
            carry_out(*prepared(recipe, progress=progress), self.directory, resume=True)
        return Reweighting(self.directory)

    def plot(self) -> Chart:
        """How the weights evolved: a chart that a notebook shows; `.png()` is the picture, `.figure()` matplotlib's."""
        ((_, charts),) = self._report.charts()
        return next(chart for chart in charts if chart.name == "upper")

    def report(self, output: str | Path | None = None) -> Path:
        """Write the run's report, as one HTML file, and return its path.

        output: None writes `report.html` in the run directory. Raises `InputError` if it is a file that is no report.
        """
        file = Path(output) if output is not None else self.directory / "report.html"
        check_output(file, None)
        return write(self._report, output=file)[0]

    def mix(
        self,
        rows: int | None = None,
        *,
        tokens: int | None = None,
        output: str | Path | None = None,
        weights: str = "average",
        format: str = AS_THEY_ARE,
        max_repeats: int = MAX_REPEATS,
        on_shortfall: OnShortfall = "error",
        all_rows: bool = False,
        seed: int = 0,
        allow_changed_data: bool = False,
    ) -> Dataset:
        """Draw a data set by the learned weights.

        rows, tokens: its size, in one of the two.
        output: a file to write it to as well, .jsonl or .parquet, beside a card of what was drawn. Without it the data set
            is held in memory.
        weights: "average", "final", or a JSON file {source: weight}.
        format: "source" leaves rows as they are; the name of a format, such as "messages", writes all in that one.
        all_rows: draw from all rows of the sources, also where the run read a sample of them (`max_rows`).

        See `bilevel_llm.mixing.draw.make_mix` for the rest, and for what it raises.
        """
        with entered(self.directory) as place, TemporaryDirectory() as folder:
            run = read_weights(place.run or self.directory, load_plugins(), weights_of(weights, place))
            if not allow_changed_data:
                run.check_data()
            drawn = make_mix(
                run.with_all_rows().problem if all_rows else run.problem,
                run.weights,
                rows=rows,
                tokens=tokens,
                seed=seed,
                max_repeats=max_repeats,
                on_shortfall=on_shortfall,
                format=format,
            )
            file = place.path(Path(output)) if output is not None else Path(folder) / "mix.parquet"
            drawn.write(file, {"weights": run.origin, "recipe": str(run.recipe_file)})
            return _read(file, in_memory=output is None)

    def export(
        self,
        to: str,
        output: str | Path | None = None,
        *,
        weights: str = "average",
        mix: str | Path | None = None,
        stop: Stop = "first",
        seed: int = 0,
        trainer_version: str | None = None,
        allow_changed_data: bool = False,
    ) -> dict[str, str]:
        """The files that tell a trainer the weights, by name. `run.to_trl()` is short for `run.export("trl")`.

        to: the name of an exporter; `bilevel list` shows all.
        output: where to write them as well: a file, or a directory if there are several.

        See `bilevel_llm.exporters.run.export` for the rest, and for what it raises.
        """
        target = Path(output) if output is not None else None
        if target is not None:
            check_free(target)
        with entered(self.directory) as place:
            files = export(
                place.run or self.directory,
                to,
                load_plugins(),
                output=place.path(target) if target is not None else None,
                weights=weights_of(weights, place),
                mix=place.path(Path(mix)) if mix is not None else None,
                stop=stop,
                seed=seed,
                trainer_version=trainer_version,
                allow_changed_data=allow_changed_data,
            )
        if target is not None:
            write_files(files, target)
        return files

    def __getattr__(self, name: str) -> Callable[..., dict[str, str]]:
        exporter = name.removeprefix("to_")
        if exporter == name or exporter not in load_plugins().parts["exporters"]:
            raise AttributeError(f"a reweighting has no attribute {name!r}")
        return partial(self.export, exporter)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *(f"to_{name}" for name in load_plugins().parts["exporters"])]

    def __repr__(self) -> str:
        return as_text(self._run.answer, self._state)

    def _repr_html_(self) -> str:
        return as_html(self._run.answer, self._state)

    @property
    def _state(self) -> str:
        longer = self.verdict is not None and self.verdict.decision == "run longer"
        how = "; from Python, .extend() runs longer" if longer or not self._run.complete else ""
        return f"{self._run.state}, in {self.directory}{how}"

    @cached_property
    def _run(self) -> SavedRun:
        return read_run(self.directory)

    @property
    def _account(self) -> Account:
        assert self._run.account is not None  # a run writes it with its first step
        return self._run.account

    @cached_property
    def _report(self) -> Report:
        return read([self.directory])


def prepared(recipe: Recipe, *, progress: bool) -> tuple[Config, Observer]:
    """The parts of a run, checked, and the loggers that are installed; those that show the progress only if asked for."""
    plugins = load_plugins()
    if not progress:
        for name in PROGRESS:
            if plugins.manager.has_plugin(name):
                plugins.manager.unregister(name=name)
    return load_config(recipe, plugins), plugins.hooks


def carry_out(config: Config, observer: Observer, directory: Path, *, resume: bool) -> None:
    """Run it. Raises `Interrupted`, saying how to go on from Python, and whatever else `bilevel.fit` raises."""
    try:
        config.fit(resume=resume, observer=observer)
    except Interrupted as error:
        how = f"continue with bilevel.load_reweighting({str(directory)!r}).extend()"
        raise Interrupted(f"{str(error).rpartition('; ')[0]}; {how}") from None


def _read(file: Path, *, in_memory: bool) -> Dataset:
    from datasets import Dataset
    from pyarrow import parquet

    if in_memory:
        return Dataset(parquet.read_table(file))
    return Dataset.from_parquet(str(file)) if file.suffix == ".parquet" else Dataset.from_json(str(file))
