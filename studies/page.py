"""Write docs/explanation-evidence.md from the numbers in results/. Nothing on that page is typed by hand.

Usage: python studies/page.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev

import yaml
from results import Cell, Results

from bilevel.statistics import Interval, interval

HERE = Path(__file__).parent
ROOT = HERE.parent

RESULTS = HERE / "results"
PAGE = ROOT / "docs" / "explanation-evidence.md"

OURS, UNIFORM, SWARM, TRUTH, ONLY = "learned", "uniform", "swarm", "truth", "only "
OTHERS = (UNIFORM, "less", "less (paper)", "doremi", "odm", "scalebio (paper)")
NEAR = 0.005  # nats: as good as the best mix
TIE = 1e-6  # weights that differ by less are equal

QUESTIONS = {
    "main": "Are learned weights better?",
    "scale": "With ten times the budget, on a GPU?",
    "answers": "Are more questions answered rightly?",
    "budget": "What does a smaller budget give?",
    "transfer": "Do weights carry over to another model?",
    "sources": "How many sources?",
    "target": "How many rows of the target?",
    "size": "What if a source has ten times more rows?",
}
"""What a comparison is there for -> the title of its part of the page. "main" comes first."""

SERIES = ("sources", "target", "size")
"""Those whose comparisons have a line each, and not tables of their own."""


def write(results: Path = RESULTS, page: Path = PAGE) -> None:
    """Write the page. results: the directory with the numbers."""
    (ROOT / page).write_text(text(read(ROOT / results), planned()), encoding="utf-8")


def planned() -> list[str]:
    """The names of all comparisons of the study."""
    entries = yaml.safe_load((HERE / "study.yaml").read_text(encoding="utf-8"))["comparisons"]
    return [entry["name"] for entry in entries]


def read(results: Path = RESULTS) -> list[Results]:
    """All results, by question and name."""
    found = [Results.model_validate_json(file.read_text(encoding="utf-8")) for file in results.glob("*.json")]
    return sorted(found, key=lambda one: (list(QUESTIONS).index(one.about), one.name))


def text(results: Sequence[Results], planned: Sequence[str] = ()) -> str:
    """The page. planned: the comparisons that it should show."""
    by_question = {about: [one for one in results if one.about == about] for about in QUESTIONS}
    parts = [
        "# Evidence: what learned weights are worth",
        "<!-- Written by studies/page.py from studies/results; edit those. -->",
        "This page is made from measurements that you can repeat with `python studies/study.py` (see "
        "[studies](../studies/README.md)). For each method and seed, weights are found, a mix is drawn, the same model is "
        "fine-tuned on it, and the result is scored on rows that no method has seen. Every seed has its own sample of "
        "source and target rows. Intervals are 95%, over test rows and seeds, and not corrected for their number.",
        *_summary(by_question["main"]),
    ]
    if missing := [name for name in planned if name not in [one.name for one in results]]:
        parts.append(f"Not measured yet: {', '.join(missing)}.")
    for about, title in QUESTIONS.items():
        if by_question[about]:
            parts += [f"## {title}"]
            parts += _variants(by_question[about]) if about in SERIES else _mains(by_question[about])
    parts += _when_not(results)
    return "\n\n".join(parts) + "\n"


def _summary(mains: Sequence[Results]) -> list[str]:
    """Whether the goals were met, case by case."""
    if not mains:
        return []
    rows = []
    for one in mains:
        wins = [other for other in OTHERS if (d := difference(one, OURS, other)) is not None and d.high < 0]
        losses = [other for other in OTHERS if (d := difference(one, OURS, other)) is not None and d.low > 0]
        rows.append(
            [
                one.name,
                _signed(difference(one, OURS, SWARM)),
                _ratio(_cost(one, OURS), _cost(one, SWARM)),
                ", ".join(wins) or "–",
                ", ".join(losses) or "–",
            ]
        )
    columns = (
        "case",
        "learned − swarm's best mix, nats",
        "its tokens, as a part of the swarm's",
        "better than",
        "worse than",
    )
    return [
        "## In short",
        _table(columns, rows),
        f"Better or worse: the interval of the difference excludes 0; only {', '.join(OTHERS)} are named. A mix within "
        f"{NEAR} nats of the swarm's is as good for most purposes.",
    ]


def _mains(results: Sequence[Results]) -> list[str]:
    """The tables of each comparison."""
    parts = []
    for one in results:
        metric, *more = one.cells[0].metrics
        parts += [f"### {one.name}", _facts(one), _scores(one, metric, more), _weights(one, metric)]
        parts += _answered(one)
        parts += _missing(one)
        flagged = [sentence for sentence in one.findings if not sentence.startswith("within the noise")]
        if flagged:
            parts.append("\n".join(f"* {sentence}" for sentence in flagged[:12]))
    return parts


def _missing(one: Results) -> list[str]:
    """What was to be measured, and is not."""
    measured = _measured(one)
    absent = [method for method in one.methods if method not in measured]
    parts = [f"Not measured yet: {', '.join(absent)}."] if absent else []
    if left := len(measured) * len(one.seeds) - len(one.cells):
        parts.append(f"{left} cell{'s' * (left > 1)} of the others {'are' if left > 1 else 'is'} missing.")
    return [" ".join(parts)] if parts else []


def _measured(one: Results) -> list[str]:
    """The methods that have a cell."""
    return [method for method in one.methods if _cells(one, method)]


def _answered(one: Results) -> list[str]:
    """How many questions are answered rightly, where that was measured."""
    key = next((name for name in one.cells[0].metrics if name.startswith("exact_match")), None)
    if key is None:
        return []
    before, after = ([cell.metrics[key] for cell in one.cells if (cell.method == "base") == base] for base in (True, False))
    return [
        f"The model as it is answers {before[0]:.1%} of the questions rightly, and at most {max(after):.1%} after "
        "fine-tuning on any mix. Where it is next to none, only losses tell methods apart."
    ]


def _facts(one: Results) -> str:
    def rows(sets: dict[str, int]) -> str:
        return ", ".join(f"{name} {count:,}" for name, count in sets.items())

    tuned = "" if one.model == one.tuned_model else f", tuned: {one.tuned_model}"
    versions = ", ".join(f"{name} {version}" for name, version in one.versions.items())
    return (
        f"Model: {one.model}{tuned}. Rows: {rows(one.sources)}; target {rows(one.validation)}; test {rows(one.test)}. "
        f"Each mix: {one.tokens:,} tokens, in rows of at most {one.max_length}. Seeds: {len(one.seeds)}. "
        f"{one.machine}; {versions}."
    )


def _scores(one: Results, metric: str, more: Sequence[str]) -> str:
    """Scores, differences and costs of every method."""
    measured = _measured(one)
    wanted = (UNIFORM, OURS) if one.about == "transfer" else (UNIFORM, SWARM, TRUTH)
    references = [name for name in wanted if name in measured]
    rows = []
    for method in measured:
        cells = _cells(one, method)
        rows.append(
            [
                f"**{method}**" if method == OURS else method,
                _mean_and_half(interval([cell.metrics[metric] for cell in cells])),
                *(_signed(difference(one, method, reference)) for reference in references),
                *(_mean_and_half(interval([cell.metrics[name] for cell in cells]), name) for name in more),
                *(f"{cost:.1f}" if (cost := _cost(one, method, of)) is not None else "" for of in ("tokens", "seconds")),
                _own_words(cells),
            ]
        )
    names = [_words(name) for name in more]
    columns = [
        "method",
        f"{_words(metric)}, nats",
        *(f"− {name}" for name in references),
        *names,
        "tokens",
        "time",
        "its own verdict",
    ]
    return (
        _table(columns, rows)
        + "\n\n`tokens`, `time`: what finding the weights takes, as a multiple of one fine-tuning: tokens that go "
        "through a model (forward, and mostly backward), and seconds, which depend on what else a machine did. `its own "
        "verdict`: in how many seeds a run says that its weights are to be used; for the swarm, the R² of its law "
        "on runs that it has not seen."
    )


def _weights(one: Results, metric: str) -> str:
    """The weights of every method, their spread over seeds, and whether the largest is that of the best single source.

    The last only where every source was tried alone.
    """
    best = best_sources(one, metric)
    names = list(one.sources) or list(next(cell.weights for cell in one.cells if cell.weights) or {})
    tried = {ONLY + name for name in names} <= set(_measured(one))
    rows = []
    for method in one.methods:
        cells = [cell for cell in _cells(one, method) if cell.weights]
        if not cells or method.startswith(ONLY):
            continue
        row = [method, *(_mean_and_spread([cell.weights[name] for cell in cells if cell.weights]) for name in names)]
        if tried:
            judged = [cell for cell in cells if cell.seed in best]
            right = sum(_top(cell) == best[cell.seed] for cell in judged)
            tied = all(_top(cell) is None for cell in cells)
            row.append("–" if tied or not best else f"{right} of {len(judged)}")
        rows.append(row)
    columns = ["weights", *names, *(["top source is the best one alone"] if tried else [])]
    below = "Means over seeds ± their standard deviation."
    below += " The best source alone is found by fine-tuning on each of them." * tried
    return f"{_table(columns, rows)}\n\n{below}"


def _variants(results: Sequence[Results]) -> list[str]:
    """One line for each comparison of a series."""
    rows = []
    for one in results:
        cells = [cell for cell in _cells(one, OURS) if cell.weights]
        names = list(one.sources)
        largest = sorted(names, key=lambda name: -mean((cell.weights or {})[name] for cell in cells))[:4]
        weights = ", ".join(f"{n} {_mean_and_spread([(c.weights or {})[n] for c in cells])}" for n in largest)
        rows.append(
            [
                one.name,
                weights,
                f"{sum(cell.verdict == 'use' for cell in cells)} of {len(cells)}",
                *(_signed(difference(one, OURS, name)) for name in (UNIFORM, SWARM, TRUTH)),
                f"{cost:.1f}" if (cost := _cost(one, OURS)) is not None else "",
            ]
        )
    columns = ["", "learned weights (the four largest)", "to be used", "− uniform, nats", "− swarm", "− truth", "tokens"]
    return [_table(columns, rows)]


def _when_not(results: Sequence[Results]) -> list[str]:
    """Where the numbers speak against learning weights."""
    mains = [one for one in results if one.about == "main" and OURS in one.methods]
    if not mains:
        return []
    costs = [cost for one in mains if (cost := _cost(one, OURS)) is not None]
    found = [
        f"* **When one fine-tuning run is cheap.** Learning took {_range(costs)} times the tokens "
        "of one fine-tuning on a mix of this size. With two or three sources, fine-tuning on each mix that you have in "
        "mind is a direct answer.",
    ]
    told = [(one, d) for one in mains if (d := difference(one, OURS, UNIFORM)) is not None]
    if open_ := [f"{one.name} ({_signed(d)} nats)" for one, d in told if d.low <= 0 <= d.high]:
        found.append(
            f"* **When the gain is small beside the luck of seeds and rows.** In {', '.join(open_)}, learned weights and "
            "equal ones are not told apart."
        )
    if worse := [one.name for one, d in told if d.low > 0]:
        found.append(f"* **In {', '.join(worse)}, learned weights were worse than equal ones.**")
    better = [
        f"{method} in {one.name} ({_signed(d)} nats{_dearer(one, method)})"
        for one in mains
        for method in one.methods
        if method not in (OURS, TRUTH, "base") and not method.startswith(ONLY)
        if (d := difference(one, method, OURS)) is not None and d.high < 0
    ]
    if better:
        found.append(f"* **Where another method was better:** {'; '.join(better)}.")
    alone = [
        f"{method.removeprefix(ONLY)} in {one.name} ({_signed(d)} nats)"
        for one in mains
        for method in one.methods
        if method.startswith(ONLY) and (d := difference(one, method, OURS)) is not None and d.high < 0
    ]
    if alone:
        found.append(f"* **When one source is all that is needed:** {'; '.join(alone)} was better alone.")
    if warned := _warned(results):
        found.append(warned)
    return ["## When not to use it", "\n".join(found)]


def _dearer(one: Results, method: str) -> str:
    """How many times the tokens of learning a method takes, if it takes more."""
    own, ours = _cost(one, method), _cost(one, OURS)
    return f", for {own / ours:.1f} times the tokens" if own and ours and own > ours else ""


def _warned(results: Sequence[Results]) -> str:
    """What it meant when a run did not say that its weights are to be used."""
    pairs = [
        (one, cell, other)
        for one in results
        for cell in _cells(one, OURS)
        for other in _cells(one, UNIFORM)
        if other.seed == cell.seed and cell.verdict not in (None, "use")
    ]
    if not pairs:
        return ""
    metric = next(iter(pairs[0][1].metrics))
    better = sum(cell.metrics[metric] < other.metrics[metric] for _, cell, other in pairs)
    runs = sum(cell.verdict is not None for one in results for cell in _cells(one, OURS))
    where = [f"{one.name} ({n})" for one in results if (n := sum(case is one for case, _, _ in pairs))]
    return (
        f"* **When the weights themselves are what you want to know, and the run says that it does not know them yet.** "
        f"{len(pairs)} of {runs} said so: {', '.join(where)}. As a mix to train on, the weights were better than equal "
        f"ones in {better} of these {len(pairs)}: a verdict is about how well weights are known, and not about "
        "whether they help."
    )


def difference(one: Results, method: str, against: str) -> Interval | None:
    """The paired difference of two methods in the first metric; None if it was not measured. 0 of a method to itself."""
    metric = next(iter(one.cells[0].metrics))
    for found in one.differences:
        if found.metric == metric:
            if (found.method, found.against) == (method, against):
                return Interval(found.mean, found.low, found.high)
            if (found.method, found.against) == (against, method):
                return Interval(-found.mean, -found.high, -found.low)
    return None


def best_sources(one: Results, metric: str) -> dict[int, str | None]:
    """Seed -> the source that is best to be trained on alone, for seeds in which each was tried."""
    alone = [cell for cell in one.cells if cell.method.startswith(ONLY)]
    tried = sum(method.startswith(ONLY) for method in one.methods)
    seeds = {seed for seed in one.seeds if tried and sum(cell.seed == seed for cell in alone) == tried}
    best = {seed: min((c for c in alone if c.seed == seed), key=lambda c: c.metrics[metric]) for seed in seeds}
    return {seed: _top(cell) for seed, cell in best.items()}


def _top(cell: Cell) -> str | None:
    """The source with the largest weight; None if several have it."""
    weights = cell.weights or {}
    first, second = sorted(weights, key=lambda name: -weights[name])[:2]
    return first if weights[first] > weights[second] + TIE else None


def _cells(one: Results, method: str) -> list[Cell]:
    cells = [cell for cell in one.cells if cell.method == method]
    return cells[:1] if method == "base" else cells  # scored once


def _cost(one: Results, method: str, of: str = "tokens") -> float | None:
    """What finding the weights takes, as a multiple of a fine-tuning, which is the same for all methods.

    of: "tokens" that go through a model, or "seconds".
    """
    cells = [getattr(cell.cost.weights, of) for cell in _cells(one, method) if cell.cost is not None]
    tuning = [getattr(cell.cost.finetuning, of) for cell in one.cells if cell.cost is not None]
    return float(mean(cells) / mean(tuning)) if cells else None


def _own_words(cells: Iterable[Cell]) -> str:
    verdicts = [cell.verdict for cell in cells if cell.verdict is not None]
    fits = [cell.fit for cell in cells if cell.fit is not None]
    if verdicts:
        return f"use: {verdicts.count('use')} of {len(verdicts)}"
    return f"R² {min(fits):.2f} to {max(fits):.2f}" if fits else ""


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    escape: Callable[[str], str] = lambda cell: cell.replace("|", "\\|")  # noqa: E731
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(escape, line)) + " |" for line in lines)


def _mean_and_half(found: Interval, metric: str = "") -> str:
    scale, digits, unit = (100, 1, "%") if metric.startswith(("token_accuracy", "exact_match")) else (1, 3, "")
    half = f" ± {scale * (found.high - found.low) / 2:.{digits}f}" if found.known and found.high > found.low else ""
    return f"{scale * found.mean:.{digits}f}{unit}{half}"


def _mean_and_spread(values: Sequence[float]) -> str:
    spread = f" ± {stdev(values):.2f}" if len(values) > 1 and stdev(values) >= 0.005 else ""
    return f"{mean(values):.2f}{spread}"


def _signed(found: Interval | None) -> str:
    return "" if found is None else f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return low if low == high else f"{low} to {high}"


def _ratio(one: float | None, other: float | None) -> str:
    return "" if one is None or not other else f"{one / other:.2f}"


def _words(metric: str) -> str:
    return metric.partition("/")[0].replace("_", " ")


if __name__ == "__main__":
    write()
