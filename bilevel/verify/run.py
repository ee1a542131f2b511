"""Measure claims, and show the results as a table, a picture and JSON."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import textwrap
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from bilevel.files import write_atomic
from bilevel.testing.session import NotApplicable, plugins
from bilevel.verify.claims import Check, Reading

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Group

Verdict = Literal["holds", "FAILS", "skipped"]
COLOURS = {"holds": "green", "FAILS": "red", "skipped": "yellow"}


@dataclass(frozen=True)
class ClaimResult:
    """The result for one claim. `reason` says why it failed without a reading or was skipped."""

    name: str
    statement: str
    hypotheses: str
    source: str
    standing: str
    seed: int
    verdict: Verdict
    seconds: float
    readings: Sequence[Reading] = ()
    reason: str = ""


@dataclass(frozen=True)
class VerificationReport:
    """The results for all claims.

    solver: the third-party solver that was measured, if any.
    left_out: the claims that have no general form, so that such a solver is not measured on them: name -> why.
    """

    outcomes: Sequence[ClaimResult]
    seconds: float
    solver: str | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> list[str]:
        """The names of the claims that do not hold."""
        return [outcome.name for outcome in self.outcomes if outcome.verdict == "FAILS"]

    @property
    def holds(self) -> bool:
        """Whether no claim failed and at least one was measured."""
        return not self.failed and any(outcome.verdict == "holds" for outcome in self.outcomes)

    def table(self) -> Group:
        """Every claim with a row for each number that was measured; 80 columns are enough for it."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        parts: list[Any] = []
        for outcome in self.outcomes:
            verdict = Text.assemble((outcome.verdict, COLOURS[outcome.verdict]), f" ({outcome.seconds:.1f} s)")
            parts.append(Text.assemble((outcome.name, "bold"), "  ", verdict))
            parts.append(Text(f"  {outcome.source} ({outcome.standing})", "dim"))
            if outcome.reason:
                parts.append(Text(f"  {outcome.reason}"))
            table = Table(box=None, pad_edge=False, show_header=bool(outcome.readings), header_style="dim", width=78)
            table.add_column("reading", ratio=1, overflow="fold")
            for title, width in NUMBERS.items():
                table.add_column(title, width=width, justify="right", no_wrap=True)
            table.add_column("", width=2)
            for reading in outcome.readings:
                mark = "" if reading.holds else Text("no", "red")
                rows = _numbers(reading)
                table.add_row(reading.quantity, *rows[0], mark)
                for row in rows[1:]:
                    table.add_row("  distance from exact values", *row, "")
            parts += [table, Text()] if outcome.readings else [Text()]
        return Group(*parts)

    def summary(self) -> str:
        """How many claims were measured, and how many were left out, with the reasons."""
        verdicts = [outcome.verdict for outcome in self.outcomes]
        counts = [f"{verdicts.count(verdict)} {word}" for verdict, word in COUNTED.items() if verdict in verdicts]
        text = f"{len(verdicts)} claims: {', '.join(counts)}, in {self.seconds:.0f} s"
        if not self.left_out:
            return text
        why: dict[str, list[str]] = {}
        for name, reason in self.left_out.items():
            why.setdefault(reason, []).append(name)
        reasons = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in why.items())
        return f"{text}\n{len(self.left_out)} claims have no form for any solver, and were left out: {reasons}"

    def as_json(self) -> str:
        """All results as JSON, for programs."""
        return json.dumps(_finite({"holds": self.holds, **dataclasses.asdict(self)}), indent=1, ensure_ascii=False)

    def picture(self) -> bytes:
        """A PNG with one panel for each claim: the measured points with the fitted and the predicted line."""
        from matplotlib.figure import Figure

        outcomes = [outcome for outcome in self.outcomes if outcome.readings]
        columns = min(3, max(1, len(outcomes)))
        rows = -(-max(1, len(outcomes)) // columns)
        figure = Figure(figsize=(5.2 * columns, 4.2 * rows), layout="constrained")
        panels = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
        for axes, outcome in zip(panels, outcomes, strict=False):
            _draw(axes, outcome)
        for axes in panels[len(outcomes) :]:
            axes.set_axis_off()
        about = "" if self.solver is None else f" of the solver {self.solver}"
        figure.suptitle(
            f"Claims of the theory, measured{about}  (points: measured; line: fit; dashed: predicted slope)", fontsize=10
        )
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
        return buffer.getvalue()


NUMBERS = {"predicted": 9, "measured": 16, "accepted": 17}
"""Columns and their widths."""
COUNTED = {"holds": "hold", "FAILS": "fail", "skipped": "skipped"}


def verify(
    names: Sequence[str] = (), *, quick: bool = False, solver: str | None = None, processes: int | None = None
) -> VerificationReport:
    """Measure the claims of these names; all installed ones by default.

    quick: measure fewer points.
    solver: measure this solver, on the claims that are about every penalty method.
    processes: the number of claims to measure at a time; by default the number of processors.

    Raises `InputError` for an unknown name.
    """
    started = time.perf_counter()
    known = plugins().parts["checks"]
    if solver is not None:
        plugins().find("solvers", solver).load()
    chosen = [plugins().find("checks", name).name for name in names] or list(known)
    left_out: dict[str, str] = {}
    if solver is not None and not names:
        left_out = {name: check.specific for name in chosen if not (check := known[name].load()).any_solver}
        chosen = [name for name in chosen if name not in left_out]
    processes = min(processes or os.cpu_count() or 1, len(chosen))
    jobs = [(name, quick, solver) for name in chosen]
    if processes <= 1:
        outcomes = [measure(*job) for job in jobs]
    else:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            # the last ones take longest: whoever starts with them does not wait for one of them at the end
            outcomes = list(pool.map(measure, *zip(*reversed(jobs), strict=True)))[::-1]
    facts = {"quick": quick, "torch": str(torch.__version__), "processes": processes}
    return VerificationReport(outcomes, round(time.perf_counter() - started, 1), solver, left_out, facts)


def measure(name: str, quick: bool, solver: str | None = None) -> ClaimResult:
    """Measure one claim, on one thread."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    cls: type[Check] = plugins().find("checks", name).load()
    about = {key: getattr(cls, key) for key in ("statement", "hypotheses", "source", "standing", "seed")}

    def outcome(verdict: Verdict, readings: Sequence[Reading] = (), reason: str = "") -> ClaimResult:
        seconds = round(time.perf_counter() - started, 2)
        return ClaimResult(name, **about, verdict=verdict, seconds=seconds, readings=readings, reason=reason)

    if solver is not None and not cls.any_solver:
        return outcome("skipped", reason=f"the claim has no form for any solver: it is {cls.specific}")
    if solver is None:
        return outcome(*judge(cls(quick)))
    return outcome(*judge(cls(quick, plugins().find("solvers", solver).load(), general=True)))


def judge(check: Check) -> tuple[Verdict, Sequence[Reading], str]:
    """The verdict on one claim, the readings, and the reason where there are none.

    Whatever a solver raises is the reason why this claim fails; the others go on.
    """
    try:
        with np.errstate(all="ignore"):  # an overflow gives inf or NaN, which no reading accepts
            readings = list(check.readings())
    except NotApplicable as error:
        return "skipped", (), str(error)
    except ImportError as error:
        return "skipped", (), f"{error}; install the extra that brings it"
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # of any kind: a solver may end the program, too
        return "FAILS", (), f"{type(error).__name__}: {error}"
    return ("holds" if all(reading.holds for reading in readings) else "FAILS"), readings, ""


def write(report: VerificationReport, *, picture: Path | None, data: Path | None) -> None:
    """Write the picture and the JSON."""
    if picture is not None:
        write_atomic(picture, report.picture())
    if data is not None:
        write_atomic(data, report.as_json())


def _finite(value: Any) -> Any:
    """The same nested value, with None in place of numbers that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(reading: Reading) -> list[list[str]]:
    """What is predicted, measured and accepted: of the number itself, and of its distance from exact values."""
    rows = []
    if reading.measured is not None:
        fit = reading.curve.fit if reading.curve is not None else None
        accepted = reading.accepted
        rows.append(
            [
                "" if reading.predicted is None else f"{reading.predicted:.4g}",
                f"{reading.measured:.4g}" + ("" if fit is None else f" ± {(fit.high - fit.low) / 2:.1g}"),
                "" if accepted is None else f"{accepted[0]:.4g} … {accepted[1]:.4g}",
            ]
        )
    if reading.deviation is not None:
        rows.append(["", f"{reading.deviation:.1e}", "" if reading.allowed is None else f"≤ {reading.allowed:.0e}"])
    return rows or [["", "", ""]]


def _draw(axes: Axes, outcome: ClaimResult) -> None:
    """The measured points with the fitted and the predicted line; where nothing is fitted, the deviations."""
    from matplotlib.ticker import NullFormatter

    colour = {"holds": "#1a7f37", "FAILS": "#c62828"}.get(outcome.verdict, "#555555")
    axes.set_title(f"{outcome.name}: {outcome.verdict}", fontsize=11, color=colour, loc="left", fontweight="bold")
    axes.tick_params(which="both", labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    curves = [(reading, reading.curve) for reading in outcome.readings if reading.curve is not None]
    if not curves:
        _draw_deviations(axes, outcome)
        return
    for number, (reading, curve) in enumerate(curves):
        xs, ys = np.array(curve.xs), np.array(curve.ys)
        colour, marker = f"C{number % 10}", "osD^vP*X"[number % 8]
        middle = np.exp(np.log(xs).mean())
        assert reading.predicted is not None
        axes.plot(xs, ys, marker, color=colour, markersize=4, label=_legend(reading))
        axes.plot(xs, curve.fit.factor * xs**curve.fit.exponent, color=colour, linewidth=1.2)
        predicted = curve.fit.factor * middle**curve.fit.exponent * (xs / middle) ** reading.predicted
        axes.plot(xs, predicted, "--", color="black", linewidth=1, alpha=0.7)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(" / ".join(dict.fromkeys(curve.along for _, curve in curves)), fontsize=9)
    axes.set_ylabel(curves[0][0].quantity if len(curves) == 1 else "measured quantity", fontsize=9)
    axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.18))


def _legend(reading: Reading) -> str:
    return f"{reading.quantity}: slope {reading.measured:.3f}, predicted {reading.predicted:.3f}"


def _draw_deviations(axes: Axes, outcome: ClaimResult) -> None:
    """Draw each reading relative to what is allowed, where nothing is fitted; it holds if it is left of the line."""
    parts, names = [], []
    for reading in outcome.readings:
        if reading.deviation is not None and reading.allowed:
            parts.append(reading.deviation / reading.allowed)
        elif reading.measured is not None and reading.accepted is not None and math.isfinite(sum(reading.accepted)):
            low, high = reading.accepted
            parts.append(abs(reading.measured - (low + high) / 2) / ((high - low) / 2))
        else:
            continue
        names.append(textwrap.fill(reading.quantity, 34))
    colours = ["#1a7f37" if part <= 1 else "#c62828" for part in parts]
    axes.barh(range(len(parts)), np.clip(parts, 1e-12, 1e3), color=colours, height=0.6)
    axes.set_yticks(range(len(parts)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=1, linestyle="--")
    axes.set_xlabel("deviation, in parts of what is allowed (1: dashed line)", fontsize=9)
