"""The settings of a first recipe, and what each was measured from or chosen by."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bilevel.blocks import find_blocks
from bilevel.config import Config, load_config
from bilevel.dry_run import Expectation, rehearse
from bilevel.errors import InputError
from bilevel.plugins import Plugins
from bilevel.recipe import Recipe
from bilevel.trust import remote_code_is_trusted
from bilevel_llm.data.chat import Template
from bilevel_llm.data.settings import DataFiles
from bilevel_llm.data.tokens import TokenTable, default_cache, report_table, tokenize
from bilevel_llm.first_recipe.step_size import STEPS, StepSize, find_step_size
from bilevel_llm.model.cost import planned_attention
from bilevel_llm.model.files import find_model
from bilevel_llm.model.limits import learned_positions

log = logging.getLogger("bilevel.llm")

QUANTILE = 0.95
"""Of the rows, which are not cut."""
LONGEST = 4096
"""Tokens of a row at the most: longer rows cost more than a first answer is worth."""
MULTIPLE = 16
FOLDS, LEAST = 8, 5
"""Folds of the rows for `rounds`, and the fewest with which there are intervals."""
FEW_LAYERS = 4


@dataclass(frozen=True)
class Measured:
    """A recipe, and what it rests on.

    tree: the recipe as plain data.
    rows: source, and "target" for the validation data, -> its number of rows.
    whole: the share of the rows that max_length does not cut, every source counting the same.
    longest: the longest row in tokens.
    step_size: the line search; None if none was made.
    expected: of the dry run of this recipe; None if none was made.
    """

    tree: Mapping[str, Any]
    rows: Mapping[str, int]
    whole: float
    longest: int
    step_size: StepSize | None = None
    expected: Expectation | None = None


def measure(
    model: str,
    sources: Mapping[str, Sequence[str]],
    targets: Sequence[str],
    plugins: Plugins,
    *,
    output: str,
    template: Template = "auto",
    device: str = "auto",
    probe: bool = True,
) -> Measured:
    """Read all data, choose the settings, and, with `probe`, search for the step size and rehearse the run.

    Raises `InputError` for a model or data that cannot be used, with what to do.
    """
    files, trusted = find_model(model), remote_code_is_trusted()
    empty = files.build_empty(planned_attention(None), trusted)
    places = [learned_positions(empty), getattr(empty.config.get_text_config(), "max_position_embeddings", None)]
    most = min([LONGEST, *(number for number in places if number)])
    tokenizer = files.load_tokenizer(trusted)

    def read(patterns: Sequence[str]) -> TokenTable:
        return tokenize(
            DataFiles(list(patterns)), tokenizer, template=template, max_length=most, cache=default_cache() / "tokens"
        )

    tables = {name: read(paths) for name, paths in sources.items()}
    aims = {path: read([path]) for path in targets}
    for name, table in {**tables, **aims}.items():
        report_table(name, table, most)
    everything = [*tables.values(), *aims.values()]
    lengths = [table.lengths for table in everything]
    max_length = min(most, _covering(lengths))
    on_gpu = _on_gpu(device)
    smallest = {name: len(table) for name, table in {**tables, **aims}.items()}
    folds = min(FOLDS, *smallest.values())
    if folds < LEAST:
        name = min(smallest, key=lambda name: smallest[name])
        raise InputError(
            f"{name!r} has {smallest[name]} usable rows, which are too few to tell a weight from chance; "
            f"give it {LEAST} or more, better some hundreds"
        )
    each = max(1, min((32 if on_gpu else 16) // len(tables), min(map(len, tables.values())) // folds))
    batch = each * len(tables)
    validation = max(len(aims), min(batch, len(aims) * (min(map(len, aims.values())) // folds)))
    layers = len(find_blocks(empty).repeated)
    lisa = {"name": "lisa", "blocks": 2, "period": 5} if layers > FEW_LAYERS else {"name": "all"}
    tree: dict[str, Any] = {
        "problem": {
            "name": "llm-reweighting",
            "model": model,
            "sources": [{"name": name, "path": _one_or_more(paths)} for name, paths in sources.items()],
            "validation": [{"path": path, **({"name": name} if name else {})} for path, name in _set_names(targets)],
            "max_length": max_length,
            "batch_size": batch,
            **({"validation_batch_size": validation} if validation != batch else {}),
            **({"template": template} if template != "auto" else {}),
        },
        "solver": {
            "name": "rounds",
            "horizon": 40 if on_gpu else 20,
            "penalty": 10 if batch > 8 else 1,
            "lr_z": 1e-5,
            **({"folds": folds} if folds != FOLDS else {}),
        },
        "backend": {
            "name": "torch",
            "dtype": "bfloat16" if on_gpu else "float32",
            **({"device": device} if device != "auto" else {}),
        },
        "active": lisa,
        "run": {"steps": "auto", "at_most": 600 if on_gpu else 300, "output": output, "checkpoint_every": 40},
    }
    whole = float(np.mean([np.mean(rows <= max_length) for rows in lengths]))
    counts = {**{name: len(table) for name, table in tables.items()}, "target": sum(map(len, aims.values()))}
    found = Measured(tree, counts, whole, max(int(rows.max()) for rows in lengths))
    return _probed(found, plugins) if probe else found


def _probed(found: Measured, plugins: Plugins) -> Measured:
    """With the step size that a line search finds, and what the run is expected to take."""
    level = log.level
    log.setLevel(logging.WARNING)  # what is read was said before
    logging.getLogger("bilevel.init").info("trying step sizes, %d steps each, which takes a while on a CPU", STEPS)
    problem = found.tree["problem"]
    few = len(problem["sources"])  # a row of each: the rows are the same for all step sizes, so that few tell enough
    rows = problem["batch_size"] if _on_gpu(found.tree["backend"].get("device", "auto")) else few
    config = _config({**found.tree, "problem": {**problem, "batch_size": rows}}, plugins)
    optimizer: Any = getattr(config.solver, "optimizer_z")  # noqa: B009 (of `rounds`)
    size = find_step_size(config.problem, config.backend, config.active, optimizer, config.run.seed)
    tree = {**found.tree, "solver": {**found.tree["solver"], "lr_z": size.lr}}
    log.setLevel(logging.ERROR)  # as was what to beware of
    expected = rehearse(_config(tree, plugins))
    log.setLevel(level)
    return dataclasses.replace(found, tree=tree, step_size=size, expected=expected)


def _config(tree: Mapping[str, Any], plugins: Plugins) -> Config:
    return load_config(Recipe({key: dict(section) for key, section in tree.items()}, {}, "the recipe"), plugins)


def _covering(lengths: Sequence[NDArray[np.int64]]) -> int:
    """The smallest multiple that does not cut a share of `QUANTILE` of the rows, every table counting the same."""
    for length in range(MULTIPLE, LONGEST + 1, MULTIPLE):
        if np.mean([np.mean(rows <= length) for rows in lengths]) >= QUANTILE:
            return length
    return LONGEST


def _on_gpu(device: str) -> bool:
    import torch

    return torch.cuda.is_available() if device == "auto" else device.startswith("cuda")


def _one_or_more(paths: Sequence[str]) -> str | list[str]:
    return paths[0] if len(paths) == 1 else list(paths)


def _set_names(targets: Sequence[str]) -> list[tuple[str, str]]:
    """The validation sets, with names where there are several."""
    from pathlib import Path

    return [(path, Path(path).name.partition(".")[0] if len(targets) > 1 else "") for path in targets]
