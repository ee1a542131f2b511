"""What the mix would be for each validation set alone: the same run, made again for each of them.

One run cannot tell. Its signals are those of the weighted mean of the sets. To first order, y - z is the sum of what each
set contributes, which only a further replica for each set would take apart; and even that would say in which direction a set
pulls at the weights that were tried for all of them, not where the pull ends. The answers, intervals and verdicts of runs of
their own have the error rates that runs have.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING

from bilevel import InputError, account
from bilevel.config import Config, load_config
from bilevel.launch import rank, world_size
from bilevel.plain import to_plain
from bilevel.recipe import Recipe
from bilevel.run_directory import RunDirectory
from bilevel.run_reader import read_run as read_saved
from bilevel_llm.data.settings import unique_names
from bilevel_llm.data.tokens import content_hash
from bilevel_llm.model.files import find_model
from bilevel_llm.reweighting.saved_run import read_json, read_run
from bilevel_llm.reweighting.targets import ALL, Mix, keep

if TYPE_CHECKING:
    from bilevel.observer import Observer
    from bilevel.plugins import Plugins
    from bilevel_llm.reweighting.problem import LLMReweighting

log = logging.getLogger("bilevel.llm")


def mixes_of_targets(run: Path, plugins: Plugins, observer: Observer | None = None) -> list[Mix]:
    """Make the run again for each of its validation sets, in RUN/targets, and collect the answers, that of RUN first.

    Runs that are there already are gone on with, and finished ones left as they are. A batch has as many rows of a set as it
    had in RUN. The first process keeps the answers (`targets.keep`).

    Raises `InputError` if RUN has one target alone, was made in Python or is not at its end, or if its model or data have
    changed since; and whatever a run raises.
    """
    whole = read_run(run, plugins)
    problem, names = whole.problem, unique_names(whole.problem.validation)
    if len(names) < 2:
        raise InputError(f"{run} has one validation set, {names[0]!r}: its weights are those for this target alone")
    whole.check_data()
    _check_validation_and_model(run, problem, names)
    runs = [_alone(run, problem, number, name, plugins) for number, name in enumerate(names)]
    if not _is_finished(run, runs[0]):
        raise InputError(f"{run} is not at its end; go on with it first (bilevel run {whole.recipe_file} --resume)")
    minutes = sum(record.seconds for record in read_saved(run).history) / 60
    log.info("one run for each of %d targets, like %s, which took %.1f minutes", len(names), run, minutes)
    mixes = [_answer(run, ALL, plugins)]
    for name, config in zip(names, runs, strict=True):
        directory = Path(str(config.run.output))
        if not _is_finished(directory, config):
            config.fit(resume=RunDirectory(directory).recipe_file.exists(), observer=observer)
        mixes.append(_answer(directory, name, plugins))
    if rank() == 0:
        keep(run, mixes)
    return mixes


def _check_validation_and_model(run: Path, problem: LLMReweighting, names: list[str]) -> None:
    """Raise `InputError` if these are no longer what the run was made with."""
    learned = read_json(run / "weights.json")
    for name, validation in zip(names, problem.validation, strict=True):
        if content_hash(validation) != learned["data"]["validation"][name]["hash"]:
            raise InputError(f"the validation data {name!r} have changed since {run} was made; restore them, or run again")
    if find_model(problem.model).fingerprint != learned["model"]["hash"]:
        raise InputError(f"the model {problem.model} has changed since {run} was made; restore it, or run again")


def _alone(run: Path, problem: LLMReweighting, number: int, name: str, plugins: Plugins) -> Config:
    """The same run with one of the validation sets alone."""
    recipe = Recipe.read(RunDirectory(run).recipe_file)
    if any("class" in recipe.tree[part] for part in ("problem", "solver", "backend")):
        raise InputError(
            f"{run} was made in Python, from objects that a recipe cannot name; make a run for each validation set there"
        )
    rows = max(1, problem.validation_rows // len(problem.validation))
    rows = max(rows - rows % world_size(), world_size())  # processes take equal shares
    where = f"the validation set {name!r}"
    recipe.put("problem.validation", [to_plain(dataclasses.replace(problem.validation[number], name=name))], where)
    recipe.put("problem.validation_batch_size", rows, where)
    folder = f"{number + 1}-{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}"
    return load_config(recipe, plugins, output=str(run / "targets" / folder))


def _is_finished(directory: Path, config: Config) -> bool:
    """Whether a run with these settings has nothing left to do."""
    file = directory / account.FILE
    if not file.exists():
        return False
    said = account.Account.read(file)
    usable = config.run.steps == "auto" and said.verdict is not None and said.verdict.decision == "use"
    return usable or said.steps >= config.run.limit


def _answer(directory: Path, target: str, plugins: Plugins) -> Mix:
    """What a run comes to."""
    said = account.Account.read(directory / account.FILE)
    decision = said.verdict.decision if said.verdict is not None else None
    return Mix(target, dict(read_run(directory, plugins).weights), dict(said.intervals), decision, said.steps)
