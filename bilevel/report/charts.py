"""The charts of a report: which there are, and what they show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bilevel.report.comparison import Comparison, DifferenceRow, difference_rows
from bilevel.report.drawing import FONT, INK, LINE, MUTED, SERIES, SHADE, Chart, Inks, Label, shorten, thinned, tidy
from bilevel.report.findings import upper_rows
from bilevel.report.runs import Group
from bilevel.statistics import interval, smoothed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST = 10  # curves that have a colour and a label; a reader cannot follow more
PLAIN = SERIES[0][0]
BYTES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes"))


@dataclass(frozen=True)
class Scalar:
    """A number of every step that is drawn alone, or told in words where it never changes."""

    key: str
    title: str
    caption: str


SCALARS = (
    Scalar(
        "gap",
        "Penalty gap",
        "g(x, y) − g(x, z): how much worse y is than z on the training mix. It should settle near zero.",
    ),
    Scalar("penalty", "Penalty", "The multiplier of the gap."),
    Scalar("grad_norm_x", "Gradient norm of x", "Before clipping."),
)


def group_charts(group: Group, inks: Inks) -> list[Chart]:
    """The charts of one recipe's runs; what never changed is left to `constants`."""
    if not group.counted:
        return []
    charts = [upper_chart(group, inks)] if group.names else []
    for key, title, caption in (
        ("lower_parts", "Training loss by source", "Of z, on the minibatch of the step."),
        ("upper_parts", "Validation loss by set", "Of y, on the minibatch of the step: what the upper variable serves."),
        (
            "gap_parts",
            "Penalty gap by source",
            "Times the penalty, this is what pushes a weight down, compared with the others.",
        ),
    ):
        names = group.parts(key)
        own = inks if key != "upper_parts" else Inks(names)
        if names:
            charts.append(_curves(group, key, names, own, title, caption))
    for scalar in SCALARS:
        values = group.stacked(scalar.key)
        if np.isfinite(values).any() and not _constant(values):
            charts.append(_single(group, scalar.key, values, scalar.title, scalar.caption, zero=scalar.key == "gap"))
    seconds, size = group.stacked("seconds"), group.stacked("size")
    if np.nansum(size) > 0:
        rate = size / np.where(seconds > 0, seconds, np.nan)
        charts.append(
            _single(group, "throughput", rate, "Throughput", "Tokens (or rows) through forward and backward, a second.")
        )
    charts.append(_single(group, "seconds", seconds, "Seconds per step", "Wall-clock time.", floor=True))
    held = group.stacked("optimizer_bytes")
    if np.nanmax(held, initial=0) > 0 and not _constant(held):
        divisor, unit = next((d, u) for d, u in BYTES if np.nanmax(held) >= d)
        caption = f"Masters, moments and gradients, in {unit}."
        charts.append(_single(group, "optimizer", held / divisor, "Optimizer memory", caption, floor=True))
    return charts


def constants(group: Group) -> dict[str, str]:
    """Numbers that never changed, as words."""
    found = {}
    for scalar in SCALARS:
        values = group.stacked(scalar.key)
        if np.isfinite(values).any() and _constant(values):
            found[scalar.title] = f"{np.nanmax(values):g}"
    held = group.stacked("optimizer_bytes")
    if held.size and np.nanmax(held, initial=0) > 0 and _constant(held):
        divisor, unit = next((d, u) for d, u in BYTES if np.nanmax(held) >= d)
        found["Optimizer memory"] = f"{np.nanmax(held) / divisor:.3g} {unit}"
    return found


def upper_chart(group: Group, inks: Inks) -> Chart:
    """The upper variable over time."""
    shown, rest = group.names[:MOST], group.names[MOST:]
    several = len(group.counted) > 1
    title = "Weights over time" if group.is_distribution else "Upper variable over time"
    if several:
        band = "the 95% interval of that mean (Student's t)" if len(group.counted) > 2 else "from one to the other"
        caption = f"Line: mean over {len(group.counted)} seeds. Band: {band}."
    else:
        caption = "Shaded: the average over these steps, with its 95% interval (batch means)."
    if rest:
        caption += f" The {len(rest)} smallest are grey, without a label."

    def draw(axes: Axes) -> list[Label]:
        labels = []
        rows = {row.name: row for row in upper_rows(group)}
        for name in [*rest, *reversed(shown)]:
            values = group.stacked("upper", name)
            ink = inks[name]
            colour = ink.colour if name in shown else LINE[0]
            steps = np.arange(1, values.shape[1] + 1)
            mean = values.mean(0)
            axes.plot(*thinned(steps, mean), color=colour, linewidth=1.9 if name in shown else 1.0, linestyle=ink.style)
            if name not in shown:
                continue
            if several:
                low, high = _band(values, clip=group.is_distribution)
                x, low = thinned(steps, low)
                axes.fill_between(x, low, thinned(steps, high)[1], color=colour, alpha=0.16, linewidth=0)
            elif len(group.first.moving) > 1:
                _draw_average(axes, group, rows[name].average.mean, rows[name].average.low, rows[name].average.high, colour)
            labels.append(Label(name, float(mean[-1]), colour))
        _frame(axes, group)
        tidy(axes)
        if group.is_distribution:
            axes.set_ylim(bottom=0)
        return labels

    return Chart("upper", title, caption, draw, wide=True, height=280.0)


def _draw_average(axes: Axes, group: Group, mean: float, low: float, high: float, colour: str) -> None:
    """Over the steps that the average is taken from: where it lies, and its interval."""
    last = len(group.first.history)
    first = last - len(group.first.moving) + len(group.first.moving) // 2
    axes.plot([first, last], [mean, mean], color=colour, linewidth=0.9, linestyle=(0, (1, 2)), alpha=0.9)
    if np.isfinite(low) and np.isfinite(high):
        axes.fill_between([first, last], [low, low], [high, high], color=colour, alpha=0.12, linewidth=0)


def _curves(group: Group, key: str, names: Sequence[str], inks: Inks, title: str, caption: str) -> Chart:
    shown = names[:MOST]
    window = _window(group)
    alone = len(group.counted) == 1

    def draw(axes: Axes) -> list[Label]:
        labels = []
        for name in reversed(shown):
            values = group.stacked(key, name)
            steps = np.arange(1, values.shape[1] + 1)
            ink = inks[name]
            if alone and window > 1:
                axes.plot(*thinned(steps, values[0]), color=ink.colour, linewidth=0.7, alpha=0.22)
            mean = _mean_over_runs(values, window, _held(group))
            axes.plot(*thinned(steps, mean), color=ink.colour, linewidth=1.6, linestyle=ink.style)
            known = mean[np.isfinite(mean)]
            if len(known):
                labels.append(Label(name, float(known[-1]), ink.colour))
        if key == "gap_parts":
            axes.axhline(0, color=MUTED[0], linewidth=0.8)
        _frame(axes, group)
        tidy(axes)
        return labels

    more = f" The {len(names) - MOST} smallest sources are not drawn." if len(names) > MOST else ""
    return Chart(key.replace("_", "-"), title, f"{caption} {_how_smoothed(group, window)}{more}".strip(), draw)


def _single(
    group: Group,
    name: str,
    values: NDArray[np.float64],
    title: str,
    caption: str,
    *,
    zero: bool = False,
    floor: bool = False,
) -> Chart:
    window = _window(group)

    def draw(axes: Axes) -> list[Label]:
        steps = np.arange(1, values.shape[1] + 1)
        smooth = name not in ("penalty", "optimizer")
        if smooth:
            for row in values:
                axes.plot(*thinned(steps, row), color=PLAIN, linewidth=0.7, alpha=0.22)
        mean = _mean_over_runs(values, window if smooth else 1, _held(group))
        axes.plot(*thinned(steps, mean), color=PLAIN, linewidth=1.6, drawstyle="default" if smooth else "steps-mid")
        positive = values[np.isfinite(values) & (values > 0)]
        if name == "grad_norm_x" and len(positive) == np.isfinite(values).sum() and positive.max() > 50 * positive.min():
            axes.set_yscale("log")
        if zero:
            axes.axhline(0, color=MUTED[0], linewidth=0.8)
        _frame(axes, group)
        tidy(axes)
        if floor:
            axes.set_ylim(bottom=0)
        return []

    return Chart(name.replace("_", "-"), title, caption, draw, height=180.0)


def comparison_charts(comparison: Comparison) -> list[Chart]:
    """One chart a metric: differences with their intervals."""
    inks = Inks(comparison.methods)
    rows = difference_rows(comparison)
    charts = []
    for number, metric in enumerate(comparison.metrics, start=1):
        own = [row for row in rows if row.metric == metric]
        if own:
            info = comparison.metric_info[metric]
            unit = f" in {info.unit}" if info.unit else ""
            caption = f"Difference{unit} with its 95% interval; {info.better} is better, so further {_side(info.better)}."
            charts.append(Chart(f"difference-{number}", metric, caption, _forest(own, inks), height=64.0 + 26.0 * len(own)))
    return charts


def _side(better: str) -> str:
    return "left is better" if better == "lower" else "right is better"


def _forest(rows: Sequence[DifferenceRow], inks: Inks) -> Any:
    def draw(axes: Axes) -> list[Label]:
        from matplotlib.ticker import MaxNLocator

        axes.axvline(0, color=MUTED[0], linewidth=0.9)
        against = {row.against for row in rows}
        for place, row in enumerate(rows):
            colour = inks[row.method].colour
            axes.plot(
                [row.interval.low, row.interval.high], [place, place], color=colour, linewidth=2.2, solid_capstyle="round"
            )
            filled = row.interval.excludes_zero
            axes.plot([row.interval.mean], [place], "o", markersize=6, markeredgewidth=1.6, color=colour,
                      markerfacecolor=colour if filled else SHADE[0])  # fmt: skip
        words = [
            shorten(row.method, 16) if len(against) == 1 else shorten(f"{row.method} − {row.against}", 24) for row in rows
        ]
        tidy(axes)
        axes.grid(visible=False, axis="y")
        axes.grid(axis="x", color=LINE[0], linewidth=0.7)
        axes.set_yticks(range(len(rows)), words)
        axes.tick_params(axis="y", labelcolor=INK[0], labelsize=FONT)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        if len(against) == 1:
            axes.set_xlabel(f"difference from {shorten(against.pop(), 24)}", color=MUTED[0], fontsize=FONT - 0.5)
        return []

    return draw


def _band(values: NDArray[np.float64], *, clip: bool) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Interval over runs at every step; the two values themselves where there are but two."""
    if len(values) == 2:
        return values.min(0), values.max(0)
    ends = [interval(values[:, step]) for step in range(values.shape[1])]
    low, high = np.array([i.low for i in ends]), np.array([i.high for i in ends])
    return (np.clip(low, 0, 1), np.clip(high, 0, 1)) if clip else (low, high)


def _mean_over_runs(values: NDArray[np.float64], window: int, held: int) -> NDArray[np.float64]:
    """Running mean of the mean over runs; the warm-up, where steps are of another kind, is averaged for itself."""
    there = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        mean = np.where(there.any(0), np.where(there, values, 0.0).sum(0) / there.sum(0), np.nan)
    return np.concatenate([smoothed(part, window) for part in (mean[:held], mean[held:]) if len(part)])


def _held(group: Group) -> int:
    """Steps of the warm-up."""
    return len(group.first.history) - len(group.first.moving)


def _window(group: Group) -> int:
    """Steps of the running mean: enough to see a trend through minibatch noise, few enough to see a change."""
    return max(1, len(group.first.history) // 12) | 1


def _how_smoothed(group: Group, window: int) -> str:
    mean = f"running mean over {window} steps" if window > 1 else ""
    if len(group.counted) > 1:
        return f"Mean over {len(group.counted)} seeds{', ' + mean if mean else ''}."
    return f"Faint: every step; line: {mean}." if mean else ""


def _constant(values: NDArray[np.float64]) -> bool:
    known = values[np.isfinite(values)]
    return len(known) > 0 and bool((known == known[0]).all())


def _frame(axes: Axes, group: Group) -> None:
    """The steps' axis, with the warm-up shaded."""
    steps = len(group.first.history)
    held = _held(group)
    axes.set_xlim(0, max(steps, 1))
    axes.set_xlabel("step", color=MUTED[0], fontsize=FONT - 0.5, labelpad=2)
    axes.margins(y=0.08)
    if held:
        axes.axvspan(0, held, color=SHADE[0], zorder=0, linewidth=0)
        if held > 0.2 * steps:
            axes.annotate(
                "warm-up", (held / 2, 1.0), xycoords=("data", "axes fraction"), xytext=(0, -2), textcoords="offset points",
                ha="center", va="top", color=MUTED[0], fontsize=FONT - 1.5,
            )  # fmt: skip


def all_facts(group: Group) -> Mapping[str, str]:
    """The run in a few numbers, for a line of facts; medians over steps and seeds."""
    if not group.counted:
        return {}
    seconds, size = group.stacked("seconds"), group.stacked("size")
    facts = {"Steps": f"{len(group.first.history):,}"}
    held = _held(group)
    if held:
        facts["Warm-up steps"] = f"{held:,}"
    if np.nansum(size) > 0:
        facts["Tokens a second"] = f"{np.nansum(size) / max(np.nansum(seconds), 1e-9):,.0f}"
    facts["Seconds a step"] = f"{np.nanmedian(seconds):.3g}"
    facts["Time" if len(group.counted) == 1 else "Time a seed"] = _clock(float(np.nansum(seconds)) / len(group.counted))
    return {**facts, **constants(group)}


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
