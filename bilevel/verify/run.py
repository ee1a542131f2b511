"""Measure claims, and show the results as a table, a picture and JSON."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
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
    from rich.table import Table

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
    """The results for all claims. `solver`: the third-party solver that was measured, if any."""

    outcomes: Sequence[ClaimResult]
    seconds: float
    solver: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> list[str]:
        """The names of the claims that do not hold."""
        return [outcome.name for outcome in self.outcomes if outcome.verdict == "FAILS"]

    @property
    def holds(self) -> bool:
        """Whether no claim failed and at least one was measured."""
        return not self.failed and any(outcome.verdict == "holds" for outcome in self.outcomes)

    def table(self) -> Table:
        """A table with one row for each reading."""
        from rich.table import Table
        from rich.text import Text

        table = Table(show_lines=False, header_style="bold", pad_edge=False, box=None, row_styles=["", "dim"])
        for title in ("claim", "source", "reading", "predicted", "measured", "accepted", "deviation", "allowed", "verdict"):
            table.add_column(title, overflow="fold", justify="right" if title in NUMBERS else "left")
        for outcome in self.outcomes:
            first = (outcome.name, f"{outcome.source} ({outcome.standing})")
            verdict = Text.assemble((outcome.verdict, COLOURS[outcome.verdict]), f" ({outcome.seconds:.1f} s)")
            if not outcome.readings:
                table.add_row(*first, outcome.reason, "", "", "", "", "", verdict, end_section=True)
            for row, reading in enumerate(outcome.readings):
                last = row == len(outcome.readings) - 1
                table.add_row(
                    *(first if row == 0 else ("", "")),
                    reading.quantity,
                    *_numbers(reading),
                    verdict if row == 0 else "" if reading.holds else Text("no", "red"),
                    end_section=last,
                )
        return table

    def as_json(self) -> str:
        """All results as JSON, for programs."""
        return json.dumps(_finite({"holds": self.holds, **dataclasses.asdict(self)}), indent=1, ensure_ascii=False)

    def picture(self) -> bytes:
        """A PNG with one panel for each claim: the measured points with the fitted and the predicted line."""
        from matplotlib.figure import Figure

        outcomes = [outcome for outcome in self.outcomes if outcome.readings]
        columns = min(4, max(1, len(outcomes)))
        rows = -(-max(1, len(outcomes)) // columns)
        figure = Figure(figsize=(4.4 * columns, 3.5 * rows), layout="constrained")
        panels = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
        for axes, outcome in zip(panels, outcomes, strict=False):
            _draw(axes, outcome)
        for axes in panels[len(outcomes) :]:
            axes.set_axis_off()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
        return buffer.getvalue()


NUMBERS = ("predicted", "measured", "accepted", "deviation", "allowed")


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
    if solver is not None and not names:
        chosen = [name for name in chosen if known[name].load().any_solver]
    processes = min(processes or os.cpu_count() or 1, len(chosen))
    jobs = [(name, quick, solver) for name in chosen]
    if processes <= 1:
        outcomes = [measure(*job) for job in jobs]
    else:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            # the last ones take longest: whoever starts with them does not wait for one of them at the end
            outcomes = list(pool.map(measure, *zip(*reversed(jobs), strict=True)))[::-1]
    facts = {"quick": quick, "torch": str(torch.__version__), "processes": processes}
    return VerificationReport(outcomes, round(time.perf_counter() - started, 1), solver, facts)


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
        return outcome("skipped", reason="the claim is about one solver, not about every penalty method")
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


def _numbers(reading: Reading) -> list[str]:
    interval = f" [{reading.curve.fit.low:.3f}, {reading.curve.fit.high:.3f}]" if reading.curve else ""
    accepted = reading.accepted
    return [
        "" if reading.predicted is None else f"{reading.predicted:.4g}",
        "" if reading.measured is None else f"{reading.measured:.4g}{interval}",
        "" if accepted is None else f"{accepted[0]:.4g} … {accepted[1]:.4g}",
        "" if reading.deviation is None else f"{reading.deviation:.1e}",
        "" if reading.allowed is None else f"≤ {reading.allowed:.0e}",
    ]


def _draw(axes: Axes, outcome: ClaimResult) -> None:
    from matplotlib.ticker import NullFormatter

    colour = "tab:green" if outcome.verdict == "holds" else "tab:red"
    axes.set_title(f"{outcome.name}: {outcome.verdict}", fontsize=9, color=colour)
    axes.tick_params(which="both", labelsize=7)
    curves = [(reading, reading.curve) for reading in outcome.readings if reading.curve is not None]
    if not curves:
        _draw_deviations(axes, outcome)
        return
    for number, (reading, curve) in enumerate(curves):
        xs, ys = np.array(curve.xs), np.array(curve.ys)
        colour = f"C{number % 10}"
        middle = np.exp(np.log(xs).mean())
        assert reading.predicted is not None
        axes.plot(xs, ys, "o", color=colour, markersize=3)
        axes.plot(xs, curve.fit.factor * xs**curve.fit.exponent, color=colour, linewidth=1, label=_legend(reading))
        predicted = curve.fit.factor * middle**curve.fit.exponent * (xs / middle) ** reading.predicted
        axes.plot(xs, predicted, ":", color=colour, linewidth=1.5)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(
        " / ".join(dict.fromkeys(curve.along for _, curve in curves)) + "   (line: fit, dots: prediction)", fontsize=7
    )
    axes.legend(fontsize=6, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.16))


def _legend(reading: Reading) -> str:
    return f"{reading.quantity}: {reading.measured:.3f} (predicted {reading.predicted:.3f})"


def _draw_deviations(axes: Axes, outcome: ClaimResult) -> None:
    """Draw each reading relative to what is allowed, where nothing is fitted; it holds if it is left of the line."""
    parts, names = [], []
    for reading in outcome.readings:
        if reading.deviation is not None and reading.allowed:
            parts.append(reading.deviation / reading.allowed)
        elif reading.measured is not None and reading.accepted is not None:
            low, high = reading.accepted
            parts.append(abs(reading.measured - (low + high) / 2) / ((high - low) / 2))
        else:
            continue
        names.append(reading.quantity)
    axes.barh(
        range(len(parts)), np.clip(parts, 1e-12, 1e3), color=["C2" if part <= 1 else "C3" for part in parts], height=0.6
    )
    axes.set_yticks(range(len(parts)), names, fontsize=5)
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("deviation / allowed", fontsize=7)
