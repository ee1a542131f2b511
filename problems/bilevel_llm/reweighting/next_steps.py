"""The commands that make sense with weights that are to be used: draw a mix, fine-tune on it, hand the weights over."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from bilevel.account import HERE, RUN, NextStep
from bilevel.errors import InputError
from bilevel.working_directory import leads_somewhere
from bilevel_llm.data.reading import common_layout, first_rows
from bilevel_llm.data.settings import ValidationSet

if TYPE_CHECKING:
    from bilevel_llm.reweighting.problem import LLMReweighting

MIX = f"{RUN}/mix.jsonl"
PASSED_ON = ("template", "attention", "on_bad_row", "trust_remote_code")
"""Settings of the model and its data that a fine-tuning has to share."""


def next_steps(problem: LLMReweighting, weights: Mapping[str, float]) -> list[NextStep]:
    """What to do with the weights of a run whose verdict is to use them."""
    steps = []
    if rows := largest_mix(problem, weights):
        mix = ["bilevel", "mix", RUN, "--rows", str(rows), "--output", MIX, *_format(problem)]
        steps = [
            NextStep(f"draw a data set by these weights: {rows:,} rows, none of them twice", mix),
            NextStep("fine-tune the model on it, and measure what that is worth", _finetune(problem)),
        ]
    export = ["bilevel", "export-weights", RUN, "--to", "json"]
    return [*steps, NextStep("hand the weights to another trainer: or --to trl, axolotl, llamafactory, ...", export)]


def largest_mix(problem: LLMReweighting, weights: Mapping[str, float]) -> int:
    """A number of rows for which no source has to give a row twice, and hardly one more would do.

    Rows that also occur in the validation data are not drawn. 0 if a source with a weight has no others.
    """
    targets = np.concatenate([table.fingerprints for table in problem.validation_tables.values()])
    able = {name: int((~np.isin(table.fingerprints, targets)).sum()) for name, table in problem.source_tables.items()}
    # a source gives less than one row more than its share
    return max(0, min(int((able[name] - 1) / weight) for name, weight in weights.items() if weight > 0))


def _format(problem: LLMReweighting) -> list[str]:
    """Sources whose rows are laid out differently need one format for all."""
    try:
        common_layout([row for source in problem.sources for row in first_rows(source)])
    except InputError:
        return ["--format", "messages"]
    return []


def _finetune(problem: LLMReweighting) -> list[str]:
    words = ["bilevel", "finetune", "--model", _path(problem.model), "--data", MIX]
    sets = problem.validation
    if all(dataclasses.replace(ValidationSet(one.path), name=one.name) == one for one in sets):
        words += [word for one in sets for pattern in one.patterns for word in ("--validation", _path(pattern))]
    else:
        words += ["--set", f"problem.validation={json.dumps([_written(one) for one in sets], ensure_ascii=False)}"]
    words += ["--max-length", str(problem.max_length), "--output", f"{RUN}/tuned"]
    defaults = {field.name: field.default for field in dataclasses.fields(problem)}
    for name in PASSED_ON:
        if (value := getattr(problem, name)) != defaults[name]:
            option = ["--trust-remote-code"] if name == "trust_remote_code" else []
            words += [*option, "--set", f"problem.{name}={json.dumps(value)}"]
    return words


def _written(one: ValidationSet) -> dict[str, Any]:
    """A validation set as one would write it into a recipe: without what it does not say."""
    said = {
        field.name: getattr(one, field.name)
        for field in dataclasses.fields(one)
        if field.default is dataclasses.MISSING or getattr(one, field.name) != field.default
    }
    paths = [*map(_path, one.patterns)]
    return said | {"path": paths if isinstance(one.path, list) else paths[0]}


def _path(path: str) -> str:
    return f"{HERE}{path}" if leads_somewhere(path) else path
