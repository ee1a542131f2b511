"""The numbers of a comparison that the page shows, taken from its directory: no text of anybody's rows, and no paths."""

from __future__ import annotations

import json
import os
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import BaseModel, ConfigDict

from bilevel.report.comparison import Difference

VERSIONS = ("bilevel", "torch", "transformers", "peft")


class Spent(BaseModel):
    """What a stage took."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    seconds: float
    tokens: int


class Cost(BaseModel):
    """What a cell took: finding the weights, and fine-tuning."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    weights: Spent
    finetuning: Spent


class Cell(BaseModel):
    """A method with a seed. The model as it is has no weights and no cost.

    verdict: what a run that learned says of its weights.
    fit: R² of a swarm's law on runs that it has not seen.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    method: str
    seed: int
    metrics: dict[str, float]
    weights: dict[str, float] | None = None
    cost: Cost | None = None
    verdict: str | None = None
    fit: float | None = None


class Results(BaseModel):
    """A comparison.

    sources, validation, test: set -> its number of rows.
    tokens: of every mix.
    steps: of fine-tuning.
    findings: what the comparison says of itself.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    name: str
    about: str
    model: str
    tuned_model: str
    sources: dict[str, int]
    validation: dict[str, int]
    test: dict[str, int]
    tokens: int
    max_length: int
    methods: list[str]
    seeds: list[int]
    cells: list[Cell]
    differences: list[Difference]
    findings: list[str]
    versions: dict[str, str]
    machine: str


def distilled(directory: Path) -> dict[str, Any]:
    """What `Results` holds of a comparison, as plain data."""
    comparison = json.loads((directory / "comparison.json").read_text(encoding="utf-8"))
    recipe = yaml.safe_load((directory / "recipe.yaml").read_text(encoding="utf-8"))
    rows = _rows(directory)
    problem = recipe["problem"]
    return {
        "model": _name(problem["model"]),
        "tuned_model": _name(comparison["settings"]["model"] or problem["model"]),
        "sources": rows["sources"],
        "validation": rows["validation"],
        "test": {name: found["rows"] for name, found in comparison["test"].items()},
        "tokens": comparison["settings"]["tokens"],
        "max_length": problem["max_length"],
        "methods": comparison["methods"],
        "seeds": comparison["seeds"],
        "cells": [_cell(directory, cell) for cell in comparison["cells"]],
        "differences": [
            {key: found[key] for key in ("method", "against", "metric", "mean", "low", "high")}
            for found in comparison["differences"]
        ],
        "findings": [finding["sentence"] for finding in comparison["findings"] if finding["flagged"]],
        "versions": {name: version(name) for name in VERSIONS},
        "machine": _machine(),
    }


def _cell(directory: Path, cell: dict[str, Any]) -> dict[str, Any]:
    """A cell of comparison.json, with what the run that found its weights says of them."""
    kept: dict[str, Any] = {key: cell[key] for key in ("method", "seed", "metrics", "weights", "cost") if key in cell}
    run = directory / "cells" / cell["method"] / f"seed-{cell['seed']}" / "weights"
    if (run / "account.json").exists():
        account = json.loads((run / "account.json").read_text(encoding="utf-8"))
        if account.get("verdict"):
            kept["verdict"] = account["verdict"]["decision"]
        fits = [
            float(found[1])
            for finding in account["findings"]
            if finding["name"] == "law-fit" and (found := re.search(r"R² = (-?[\d.]+)", finding["sentence"]))
        ]
        kept |= {"fit": fits[0]} if fits else {}
    return kept


def _rows(directory: Path) -> dict[str, dict[str, int]]:
    """How many rows sources and validation sets have, from the first run that found weights."""
    for file in sorted((directory / "cells").glob("*/seed-*/weights/weights.json")):
        data = json.loads(file.read_text(encoding="utf-8"))["data"]
        return {kind: {name: found["rows"] for name, found in data[kind].items()} for kind in ("sources", "validation")}
    return {"sources": {}, "validation": {}}


def _name(model: str) -> str:
    """The last part of a path: where files are on a machine says nothing."""
    return Path(model).parent.name if Path(model).name == "model" else Path(model).stem


def _machine() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} × {torch.cuda.get_device_name(0)}"
    return f"{os.cpu_count()} CPU cores, {platform.machine()}"
