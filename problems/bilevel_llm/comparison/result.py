"""The result of a comparison: comparison.json, in the form of `bilevel.report.comparison`, and its view on the terminal."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from bilevel.account import Finding
from bilevel.files import write_atomic
from bilevel.plain import to_plain
from bilevel.report.comparison import FILE, Comparison, difference_rows, score_rows
from bilevel.statistics import Interval
from bilevel_llm.comparison.cell import Bench, Cell
from bilevel_llm.comparison.held_out import BETTER, UNITS
from bilevel_llm.comparison.paired import paired_intervals
from bilevel_llm.comparison.settings import BASE


def build(
    bench: Bench, methods: Sequence[str], cells: Mapping[tuple[str, int], Cell], references: Sequence[str]
) -> dict[str, Any]:
    """The content of comparison.json: what has been measured so far.

    cells: (method, seed) -> a finished cell. The model as it is has one scored cell, which stands for every seed.
    """
    seeds = bench.settings.seeds
    content = {
        "methods": list(methods),
        "seeds": seeds,
        "references": list(references),
        "unit": bench.problem.labels.unit,
        "metric_info": {
            f"{metric}/{held_out.name}": {"better": BETTER[metric], **({"unit": UNITS[metric]} if metric in UNITS else {})}
            for held_out in bench.sets
            for metric in held_out.metrics
        },
        "cells": [
            {"method": method, "seed": seed, "metrics": dict(cell.metrics), **_facts(cell)}
            for (method, seed), cell in cells.items()
        ],
        "differences": _differences(bench, methods, references, cells),
        "test": {
            s.name: {"rows": len(s.table), "dropped": s.dropped, "hash": s.table.content_hash, "metrics": list(s.metrics)}
            for s in bench.sets
        },
        "settings": to_plain(bench.settings),
    }
    content["findings"] = [to_plain(finding) for finding in _findings(bench, methods, cells)]
    Comparison.model_validate(content)
    return content


def write(content: Mapping[str, Any], directory: Path) -> None:
    """Write the content as comparison.json in the directory."""
    write_atomic(directory / FILE, json.dumps(content, indent=1, ensure_ascii=False))


def shown(content: Mapping[str, Any]) -> RenderableType:
    """The scores, the differences and what to know about them, for a terminal."""
    comparison = Comparison.model_validate(content)
    return Group(
        _scores(comparison, content["cells"]),
        Text(),
        _difference_table(comparison),
        *(Text(f"- {finding.sentence}") for finding in [*_unclear(comparison), *comparison.all_findings()]),
    )


def _facts(cell: Cell) -> dict[str, Any]:
    """What a cell took: `cost` covers finding the weights and training; `size` is the tokens of training, the budget."""
    if cell.method is None:
        return {}
    found, drawn, tuned = cell.found, cell.drawn, cell.tuned
    return {
        "cost": {
            "gpu_seconds": round(found.seconds + tuned.seconds, 3),
            "size": tuned.tokens,
            "weights": {"seconds": found.seconds, "tokens": found.tokens},
            "finetuning": {"seconds": tuned.seconds, "tokens": tuned.tokens, "steps": tuned.steps},
        },
        "weights": dict(found.weights),
        "mix": {
            "rows": drawn.rows,
            "tokens": drawn.tokens,
            "sources": {name: source.rows for name, source in drawn.sources.items()},
        },
    }


def _differences(
    bench: Bench, methods: Sequence[str], references: Sequence[str], cells: Mapping[tuple[str, int], Cell]
) -> list[Mapping[str, Any]]:
    """Differences over the seeds that both methods have. Perplexity is left out: its logarithm is the loss.

    The difference of two references is there once.
    """
    seeds: dict[tuple[str, str], tuple[int, ...]] = {}
    for i, reference in enumerate(references):
        for method in (method for method in methods if method not in references[: i + 1]):
            both = tuple(s for s in bench.settings.seeds if (method, s) in cells and (reference, s) in cells)
            if both:
                seeds[method, reference] = both
    found: list[Mapping[str, Any]] = []
    for held_out in bench.sets:
        for metric in (metric for metric in held_out.metrics if metric != "perplexity"):
            for shared in dict.fromkeys(seeds.values()):
                pairs = [pair for pair, both in seeds.items() if both == shared]
                differences = [
                    [
                        cells[a, s].rows[held_out.name].sums[metric] - cells[b, s].rows[held_out.name].sums[metric]
                        for s in shared
                    ]
                    for a, b in pairs
                ]
                counts = cells[pairs[0][0], shared[0]].rows[held_out.name].counts[metric]
                for (method, reference), between in zip(pairs, paired_intervals(differences, counts), strict=True):
                    if between.known:
                        names = {"method": method, "against": reference, "metric": f"{metric}/{held_out.name}"}
                        ends = {"mean": between.mean, "low": between.low, "high": between.high}
                        found.append({**names, **ends, "seeds": len(shared)})
    return found


def _findings(bench: Bench, methods: Sequence[str], cells: Mapping[tuple[str, int], Cell]) -> list[Finding]:
    """What a skeptic would ask about."""
    found = []
    for s in bench.sets:
        if s.dropped:
            words = f"{s.dropped} rows of the test set {s.name!r} are also in the sources or validation data, and left out"
            found.append(Finding("rows-dropped", False, words))
    if len(bench.settings.seeds) == 1:
        words = "one seed: the intervals are over test rows alone; another seed would give other numbers"
        found.append(Finding("one-seed", True, words))
    said: dict[Finding, dict[str, list[int]]] = {}
    for (method, seed), cell in cells.items():
        if cell.method is not None:
            for finding in [*cell.found.findings, *(Finding("mix", True, note) for note in cell.drawn.departures)]:
                said.setdefault(finding, {}).setdefault(method, []).append(seed)
    for finding, where in said.items():
        for seeds in dict.fromkeys(map(tuple, where.values())):
            named = ", ".join(method for method in methods if tuple(where.get(method, ())) == seeds)
            words = f"{named}, seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}: {finding.sentence}"
            found.append(dataclasses.replace(finding, sentence=words))
    return found


def _scores(comparison: Comparison, cells: Sequence[Mapping[str, Any]]) -> Table:
    """Means over seeds, each with its interval (Student's t over seeds), and what a cell took on average."""
    metrics = [metric for metric in comparison.metrics if not metric.startswith("perplexity/")]
    places = [comparison.metrics.index(metric) for metric in metrics]
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("method")
    for metric in (*metrics, "weights s", "tuning s", "tokens"):
        table.add_column(_plain(metric).replace("/", "\n"), justify="right")
    for row in score_rows(comparison):
        values = []
        for place in places:
            score = row.scores[place]
            values.append("" if score is None else _value(score.interval, comparison.metrics[place]))
        costs = [cell["cost"] for cell in cells if cell["method"] == row.method and "cost" in cell]
        table.add_row(row.method, *values, *_costs(costs))
    return table


def _costs(costs: Sequence[Mapping[str, Any]]) -> Sequence[str]:
    if not costs:
        return ["", "", ""]
    parts = zip(*((c["weights"]["seconds"], c["finetuning"]["seconds"], c["size"]) for c in costs), strict=True)
    return [f"{sum(part) / len(part):,.{digits}f}" for part, digits in zip(parts, (1, 1, 0), strict=True)]


def _value(interval: Interval, metric: str) -> str:
    scale, form = (100, ".1f") if _is_share(metric) else (1, ".4f")
    text = f"{scale * interval.mean:{form}}{'%' * _is_share(metric)}"
    if interval.known and interval.high > interval.low:
        text += f" ± {scale * (interval.high - interval.low) / 2:{form}}"
    return text


def _difference_table(comparison: Comparison) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("difference")
    table.add_column("metric")
    for column in ("mean", "95% interval"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for row in difference_rows(comparison):
        mean, low, high = (_signed(value, row.metric) for value in (row.interval.mean, row.interval.low, row.interval.high))
        table.add_row(f"{row.method} - {row.against}", _plain(row.metric), mean, f"{low} to {high}", row.verdict)
    return table


def _signed(value: float, metric: str) -> str:
    return f"{100 * value:+.1f} points" if _is_share(metric) else f"{value:+.4f}"


def _is_share(metric: str) -> bool:
    return metric.startswith(("token_accuracy/", "exact_match/"))


def _plain(metric: str) -> str:
    return metric.replace("_", " ")


def _unclear(comparison: Comparison) -> list[Finding]:
    """Say in one sentence which differences are within the noise."""
    unclear: dict[str, list[str]] = {}
    rows = [row for row in difference_rows(comparison) if BASE not in (row.method, row.against)]
    for row in rows:
        if not row.interval.excludes_zero:
            unclear.setdefault(f"{row.method} and {row.against}", []).append(_plain(row.metric))
    if unclear:
        pairs = (f"{pair} ({', '.join(metrics)})" for pair, metrics in unclear.items())
        words = f"within the noise, do not read an order into: {'; '.join(pairs)}"
        return [Finding("order-unclear", True, words)]
    words = "no difference between methods is within the noise: their intervals exclude zero"
    return [Finding("order-unclear", False, words)] if rows else []
