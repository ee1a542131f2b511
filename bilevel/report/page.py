"""Read runs and comparisons, and write them as one HTML file, and the charts as PNG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from bilevel.account import Table, Value, Verdict
from bilevel.answer import REPORT, Command
from bilevel.errors import InputError
from bilevel.files import write_atomic
from bilevel.palette import THEME
from bilevel.plain import flatten
from bilevel.plaintext import escape
from bilevel.report.charts import comparison_charts, group_charts
from bilevel.report.comparison import FILE, Comparison, difference_rows, read_comparison, score_rows
from bilevel.report.drawing import Chart, Inks
from bilevel.report.facts import facts
from bilevel.report.findings import statements, upper_rows
from bilevel.report.groups import Group, differences, group_runs
from bilevel.run_reader import SavedRun, is_run, read_run
from bilevel.statistics import Interval

MARK = '<meta name="generator" content="bilevel report">'
"""Marks a file as a report, which may be replaced; other files may not."""


@dataclass(frozen=True)
class Report:
    """The content of a page."""

    groups: Sequence[Group]
    comparisons: Sequence[tuple[str, Comparison]]
    made: datetime

    @property
    def inks(self) -> Inks:
        """The colours of all names, each the same all over the page."""
        return Inks(list(dict.fromkeys(name for group in self.groups for name in group.names)))

    def charts(self) -> list[tuple[Group, list[Chart]]]:
        """The charts of every recipe."""
        return [(group, group_charts(group, self.inks)) for group in self.groups]


def read(directories: Sequence[Path], *, now: datetime | None = None) -> Report:
    """Read run directories and directories of comparisons.

    Raises `InputError` for a directory that is neither, is named twice, or holds damaged files.
    """
    runs, comparisons, seen = [], [], set()
    for directory in directories:
        if not directory.is_dir():
            raise InputError(
                f"{directory} is not a directory; name run directories, which hold recipe.yaml and metrics.jsonl"
            )
        if directory.resolve() in seen:
            raise InputError(f"{directory} is named twice")
        seen.add(directory.resolve())
        compared, ran = (directory / FILE).exists(), is_run(directory)
        if compared:
            comparisons.append((directory.name, read_comparison(directory)))
        if ran:
            runs.append(read_run(directory))
        if not compared and not ran:
            raise InputError(f"{directory} holds no run (recipe.yaml, metrics.jsonl) and no comparison ({FILE})")
    return Report(group_runs(runs), comparisons, now or datetime.now())


def write(report: Report, *, output: Path, pictures: Path | None = None) -> list[Path]:
    """Write the page, and the charts as PNG where a directory is given. Returns the files, the page first.

    Raises `InputError` if `output` is a file other than an earlier report.
    """
    check_output(output, pictures)
    charts = report.charts()
    write_atomic(output, html(report, charts))
    written = [output]
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
        for name, chart in _named(report, charts):
            write_atomic(pictures / f"report-{name}.png", chart.png())
            written.append(pictures / f"report-{name}.png")
    return written


def check_output(output: Path, pictures: Path | None) -> None:
    """Raise `InputError` if the page cannot be written there, before anything is drawn."""
    if output.is_dir():
        raise InputError(f"--output {output} is a directory; name a file, for example {output / 'report.html'}")
    if not output.parent.is_dir():
        raise InputError(f"--output {output}: there is no directory {output.parent}")
    if output.exists() and MARK not in output.read_text(encoding="utf-8", errors="replace")[:1000]:
        raise InputError(f"--output {output} exists and was not written by `bilevel report`; choose another name")
    if pictures is not None and pictures.exists() and not pictures.is_dir():
        raise InputError(f"--png {pictures} is a file; name a directory")


def html(report: Report, charts: Sequence[tuple[Group, Sequence[Chart]]] | None = None) -> str:
    """Render the page as HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("bilevel.report"),
        autoescape=True,
        finalize=lambda value: escape(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, signed=signed, span=span, seconds=_seconds, yaml=_yaml, cell=_cell)
    inks = report.inks
    return environment.get_template("page.html").render(
        mark=MARK,
        theme=THEME,
        made=report.made.strftime("%Y-%m-%d %H:%M"),
        version=version("bilevel"),
        title=_title(report),
        overview=_overview(report) if len(report.groups) > 1 else None,
        comparisons=[_comparison(name, comparison) for name, comparison in report.comparisons],
        groups=[_section(group, drawn, inks) for group, drawn in (charts if charts is not None else report.charts())],
    )


def number(value: float | None) -> str:
    """Format with three decimals if the number is of the size of a weight or a loss, else with four significant digits."""
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value:.3f}" if 0.01 <= abs(value) < 1000 or abs(value) < 1e-12 else f"{value:,.4g}"
    return text.replace("-", "−")


def signed(value: float) -> str:
    """Format a number with its sign."""
    return number(value) if value < 0 or not math.isfinite(value) else f"+{number(value)}"


def span(interval: Interval) -> str:
    """Format an interval as in a paper, both ends with as many decimals; a dash if there is none."""
    if not interval.known:
        return "–"
    if 0.01 <= max(abs(interval.low), abs(interval.high)) < 1000:
        return f"[{interval.low:.3f}, {interval.high:.3f}]".replace("-", "−")
    return f"[{number(interval.low)}, {number(interval.high)}]"


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value / 3600:.2f} h" if value >= 3600 else f"{value:,.0f} s"


def _yaml(tree: Any) -> str:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True) if tree else "# recipe.yaml is missing"


def _title(report: Report) -> str:
    names = [run.label for group in report.groups for run in group.runs] + [name for name, _ in report.comparisons]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _section(group: Group, charts: Sequence[Chart], inks: Inks) -> dict[str, Any]:
    rows = upper_rows(group)
    top = max((row.average.high if row.average.known else row.average.mean for row in rows), default=1.0)
    upper = {chart.name: chart for chart in charts}.get("upper")
    return {
        "group": group,
        "rows": [(row, inks[row.name].variable, _bar(row.average, top)) for row in rows],
        "verdicts": _verdicts(group),
        "commands": _commands(group),
        "statements": statements(group),
        "tables": _tables(group),
        "facts": facts(group),
        "upper": upper,
        "charts": [chart for chart in charts if chart is not upper],
        "versions": _versions(group.runs),
        "pooled": len(group.counted) > 1,
        "solver": _part(group.first, "solver"),
        "problem": _part(group.first, "problem"),
        "notes": [*group.notes, *(f"{run.label}: {note}" for run in group.runs for note in run.notes)],
    }


def _verdicts(group: Group) -> list[tuple[str, Verdict]]:
    """The verdict of each run that has one, after the run's name if there are several."""
    alone = len(group.runs) == 1
    return [
        ("" if alone else run.label, run.account.verdict)
        for run in group.runs
        if run.account is not None and run.account.verdict is not None
    ]


def _commands(group: Group) -> list[Command]:
    """What to do next with the only run of a group, other than to make this report."""
    if len(group.runs) > 1:
        return []
    return [command for command in group.first.answer.commands if command.purpose != REPORT.purpose]


def _tables(group: Group) -> list[tuple[str, Table]]:
    """The problem's tables with their headings: once if all runs have the same table, else under each run's name."""
    found: dict[str, list[tuple[SavedRun, Table]]] = {}
    for run in group.runs:
        for table in run.account.tables if run.account else ():
            found.setdefault(table.title, []).append((run, table))
    headed = []
    for title, tables in found.items():
        first = tables[0][1]
        if all(table == first for _, table in tables):
            headed.append((title, first))
        else:
            headed += [(f"{title}: {run.label}", table) for run, table in tables]
    return headed


def _cell(value: Value) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else number(value)


def _part(run: SavedRun, kind: str) -> str:
    section = run.recipe.get(kind)
    found = section.get("name", section.get("class", "")) if isinstance(section, Mapping) else ""
    return str(found).rpartition(":")[2]


def _bar(interval: Interval, top: float) -> dict[str, float]:
    """The value and the ends of its interval, in percent of the longest bar."""
    scale = 100 / top if top > 0 else 0.0
    ends = (interval.low, interval.high) if interval.known else (interval.mean, interval.mean)
    return {"value": interval.mean * scale, "low": ends[0] * scale, "high": ends[1] * scale}


def _overview(report: Report) -> dict[str, Any]:
    names = report.inks.names
    each = [{row.name: row for row in upper_rows(group)} for group in report.groups]
    return {
        "groups": report.groups,
        "rows": [(name, [rows.get(name) for rows in each]) for name in names],
        "differences": differences(report.groups),
    }


def _comparison(name: str, comparison: Comparison) -> dict[str, Any]:
    return {
        "name": name,
        "comparison": comparison,
        "scores": score_rows(comparison),
        "differences": difference_rows(comparison),
        "charts": comparison_charts(comparison),
        "findings": comparison.all_findings(),
    }


def _versions(runs: Sequence[SavedRun]) -> list[tuple[str, list[str]]]:
    """The keys, each with its value in every run, or with a single value if all agree."""
    each = [flatten({"versions": run.account.versions, **run.account.identity}) if run.account else {} for run in runs]
    table = []
    for key in dict.fromkeys(key for known in each for key in known):
        values = [str(known.get(key, "–")) for known in each]
        table.append((key, values[:1] if len(set(values)) == 1 else values))
    return table


def _named(report: Report, charts: Sequence[tuple[Group, Sequence[Chart]]]) -> list[tuple[str, Chart]]:
    """The charts by file name, which contains the number of the recipe or comparison if there are several."""
    named = []
    for place, (_, drawn) in enumerate(charts, start=1):
        named += [(f"{place}-{chart.name}" if len(charts) > 1 else chart.name, chart) for chart in drawn]
    for place, (_, comparison) in enumerate(report.comparisons, start=1):
        prefix = f"comparison-{place}-" if len(report.comparisons) > 1 else "comparison-"
        named += [(prefix + chart.name, chart) for chart in comparison_charts(comparison)]
    return named
