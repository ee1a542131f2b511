"""`bilevel.reweight`: how much weight does each source deserve? With data and model from memory or from files."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bilevel.config import Config
from bilevel.errors import InputError
from bilevel.launch import rank, world_size
from bilevel.logger import Logger
from bilevel.observer import check_loggers
from bilevel.recipe import Recipe
from bilevel.run_directory import RunDirectory
from bilevel.trust import trusting_remote_code
from bilevel_llm.api.inputs import Data, Inputs
from bilevel_llm.api.reweighting import Reweighting, carry_out, prepared
from bilevel_llm.first_recipe.step_size import find_step_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("bilevel.llm")

DEFAULT_OUTPUT = Path("runs/reweighting")
HORIZON = 40
UNKNOWN = 1e-5
"""A step size in its place, until one is found."""


def reweight(
    model: str | PathLike[str] | PreTrainedModel,
    sources: Mapping[str, Data],
    target: Data | Mapping[str, Data],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    output: str | PathLike[str] | None = None,
    steps: int | Literal["auto"] = "auto",
    lr: float | Literal["auto"] = "auto",
    batch_size: int = 16,
    max_length: int = 1024,
    max_rows: int | None = None,
    seed: int = 0,
    backend: str = "torch",
    settings: Mapping[str, Any] | None = None,
    progress: bool = True,
    loggers: str | Sequence[str | Mapping[str, Any] | Logger] = (),
    trust_remote_code: bool = False,
) -> Reweighting:
    """Learn how much weight each source of training data deserves, for a model and a target.

    It makes a recipe of `llm-reweighting` and carries it out; the run directory is like that of `bilevel run`. What is given
    in memory is written to `inputs/` in it, so that the run can be resumed and mixed later.

    model: a directory, a GGUF file or a hub id in the local cache; or a loaded `PreTrainedModel`, of which the run
        trains a copy that it writes (give the path of a large one instead).
    sources: name -> its rows: a path, a glob, or a list of them; a list of dictionaries; a `datasets.Dataset` or
        `IterableDataset`; a pandas, polars or pyarrow table; or settings as in a recipe, such as `{"path": ..., "format":
        "text"}`, where `rows` may stand in place of `path`. At least two sources.
    target: the rows that training should serve, in any of these forms; or a mapping name -> rows, for several targets.
    tokenizer: that of a loaded model.
    output: the run directory, which must be new or empty; None takes the first of `runs/reweighting`, `runs/reweighting-2`,
        ... that does not exist.
    steps: training steps; "auto" ends when the verdict is to use the weights, or after 600 (`run.at_most`).
    lr: the step size of the training that the weights are for; "auto" finds one on these data, by a few steps of training
        with each of several, which takes as long as twenty steps of the run at the most.
    batch_size: rows in a batch; every source gets an equal part.
    max_length: tokens after which rows are cut.
    max_rows: how many rows to take of an `IterableDataset`, which may have no end: the first ones.
    backend: "torch" (one process), "deepspeed" or "fsdp". Under a launcher every process calls this alike.
    settings: any other key of a recipe, as `bilevel run --set` takes it: `{"solver.horizon": 20, "active.blocks": 4}`.
        docs/reference.md lists them. By default: the solver `rounds`, LISA with two blocks, bfloat16 on a GPU and float32
        elsewhere.
    progress: show the progress of the run, in a terminal or a notebook.
    loggers: where else to log the run, as in a recipe: `["wandb"]`, or `[{"name": "mlflow", "experiment": "mixes"}]`.
    trust_remote_code: run code that the model's directory brings.

    Raises `InputError`, naming the argument, for what has to be corrected, and whatever `bilevel.fit` raises.
    """
    _check(sources, target, output, settings, lr)
    directory = RunDirectory(Path(output) if output is not None else _free())
    inputs = Inputs(directory.inputs, max_rows)
    tree = {
        "problem": {
            "name": "llm-reweighting",
            "model": inputs.model(model, tokenizer),
            "sources": [
                {"name": name, **inputs.settings(rows, f"sources[{name!r}]", name)} for name, rows in sources.items()
            ],
            "validation": _validation(target, inputs),
            "max_length": max_length,
            "batch_size": batch_size,
        },
        "solver": {"name": "rounds", "horizon": HORIZON, "lr_z": UNKNOWN if lr == "auto" else lr},
        "backend": {"name": backend, "dtype": _precision()},
        "active": {"name": "lisa", "blocks": 2, "period": 5},
        "run": {
            "steps": steps,
            "seed": seed,
            "output": str(directory.path),
            "checkpoint_every": HORIZON,
            "loggers": loggers,
        },
    }
    recipe = Recipe(tree, {}, "bilevel.reweight")
    for key, value in (settings or {}).items():
        recipe.put(str(key), value, f"settings[{key!r}]")
    with trusting_remote_code(trust_remote_code):
        config, observer = prepared(recipe, progress=progress)
        if rank() == 0:
            check_loggers(config.run.loggers)
            directory.check_free()
        with directory.owned() if rank() == 0 else nullcontext():
            if rank() == 0:
                inputs.write()  # the others wait for the first process, which alone reads the data first
            if lr == "auto" and "solver.lr_z" not in (settings or {}):
                recipe.put("solver.lr_z", _step_size(config), "lr")
                config, observer = prepared(recipe, progress=progress)
            carry_out(config, observer, directory.path, resume=False)
    return Reweighting(directory.path)


def load_reweighting(directory: str | PathLike[str]) -> Reweighting:
    """The result of a run of `llm-reweighting`, whether Python or `bilevel run` started it, and however far it is.

    Raises `InputError` if the directory holds none, or none that has done a step.
    """
    return Reweighting(Path(directory))


def _check(sources: Any, target: Any, output: Any, settings: Any, lr: Any) -> None:
    """Raise `InputError` for arguments of another form than they should have, before anything is written."""
    if not isinstance(sources, Mapping) or not all(isinstance(name, str) and name for name in sources):
        raise InputError("sources must be a mapping of names to rows, such as {'web': 'web.jsonl', 'books': dataset}")
    if len(sources) < 2:
        raise InputError(f"sources has {len(sources)} of at least two; the weight of a single source is always 1")
    if target is None:
        raise InputError("target is missing: rows that look like what the model must do")
    if not isinstance(settings, Mapping | None):
        raise InputError(f"settings is {settings!r}; give a mapping such as {{'solver.horizon': 20}}")
    if not isinstance(output, str | PathLike | None):
        raise InputError(f"output is {output!r}; give the path of a directory")
    if lr == "auto" and world_size() > 1:
        raise InputError(
            "lr is missing; under a launcher no step size is searched for: `bilevel init` finds one on one device"
        )
    if output is None and world_size() > 1:
        raise InputError("output is missing; under a launcher, all processes must agree on the run directory")


def _validation(target: Any, inputs: Inputs) -> list[dict[str, Any]]:
    """The validation sets: one, or one for each name."""
    if type(target) is dict and not {"path", "rows"} & target.keys():
        if not target:
            raise InputError("target is empty; give rows, or a mapping of names to rows")
        return [
            {"name": str(name), **inputs.settings(rows, f"target[{name!r}]", f"target-{name}")}
            for name, rows in target.items()
        ]
    return [{"name": "target", **inputs.settings(target, "target", "target")}]


def _step_size(config: Config) -> float:
    """One by which the training of this recipe moves the model, and which is not too large for it."""
    optimizer = getattr(config.solver, "optimizer_z", None)
    if optimizer is None:
        raise InputError(f"lr is not searched for with the solver {type(config.solver).__name__}; set its own in settings")
    found = find_step_size(config.problem, config.backend, config.active, optimizer, config.run.seed)
    log.info("step size %g; the loss changed by %s", found.lr, found.in_words())
    if not found.falls:
        log.warning(
            "no step size makes the training loss fall (%s); the model may know these data already", found.in_words()
        )
    return found.lr


def _precision() -> str:
    """The precision that suits this machine: few CPUs are quick in bfloat16."""
    import torch

    return "bfloat16" if torch.cuda.is_available() else "float32"


def _free() -> Path:
    """The first directory of the default name, with a number behind it, that does not exist."""
    path, number = DEFAULT_OUTPUT, 1
    while path.exists():
        number += 1
        path = DEFAULT_OUTPUT.with_name(f"{DEFAULT_OUTPUT.name}-{number}")
    return path
