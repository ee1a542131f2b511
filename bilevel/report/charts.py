"""The charts of a report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bilevel.palette import ACCENT, INK, LINE, MUTED, SHADE
from bilevel.report.comparison import Comparison, DifferenceRow, difference_rows
from bilevel.report.drawing import FONT, Chart, Inks, Label, shorten, thinned, tidy
from bilevel.report.facts import byte_unit, constant
from bilevel.report.findings import upper_rows
from bilevel.report.groups import Group
from bilevel.statistics import interval, smoothed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST = 10  # curves that have a colour and a label; a reader cannot follow more
PLAIN = ACCENT[0]


def group_charts(group: Group, inks: Inks) -> list[Chart]:
    """The charts of one recipe's runs. Settings that never changed have none: they are among the facts."""
    if not group.counted:
        return []
    charts = [upper_chart(group, inks)] if group.names else []
    labels = group.labels
    for level, name, part, of in (("lower", labels.lower_loss, labels.lower_part, "z"),
                                  ("upper", labels.upper_loss, labels.upper_part, "y")):  # fmt: skip
        key, whole, caption = f"{level}_parts", f"{level}_loss", f"Of {of}, on the minibatch of the step."
        if names := group.parts(key):
            title = f"{_capital(name)} by {part}"
            charts.append(_curves(group, key, names, inks if level == "lower" else Inks(names), title, caption))
        elif np.isfinite(group.stacked(whole)).any():
            charts.append(_single(group, whole, group.stacked(whole), _capital(name), caption))
    if names := group.parts("gap_parts"):
        caption = "g(x, y) − g(x, z)."
        if group.is_distribution and set(names) == set(group.names):
            caption += f" The {labels.upper} whose gap is the lowest is pushed up."
        charts.append(_curves(group, "gap_parts", names, inks, f"Penalty gap by {labels.lower_part}", caption))
    gap, penalty, norm = (group.stacked(key) for key in ("gap", "penalty", "grad_norm_x"))
    if np.isfinite(gap).any():
        caption = "g(x, y) − g(x, z): by how much y is worse than z on the training mix. Best near zero."
        charts.append(_single(group, "gap", gap, "Penalty gap", caption, zero=True))
    if np.isfinite(penalty).any() and not constant(penalty):
        charts.append(_single(group, "penalty", penalty, "Penalty", "The multiplier of the gap.", stepped=True))
    if np.isfinite(norm).any():
        charts.append(_single(group, "grad_norm_x", norm, "Gradient norm of x", "Before clipping.", log=True))
    seconds, size = group.stacked("seconds"), group.stacked("size")
    if np.nansum(size) > 0:
        rate = size / np.where(seconds > 0, seconds, np.nan)
        caption = f"{_capital(labels.unit)} a second, through forward and backward."
        charts.append(_single(group, "throughput", rate, "Throughput", caption, floor=True))
    charts.append(_single(group, "seconds", seconds, "Seconds per step", "Wall-clock time.", floor=True))
    held = group.stacked("optimizer_bytes")
    if np.nanmax(held, initial=0) > 0 and not constant(held):
        divisor, unit = byte_unit(float(np.nanmax(held)))
        caption = f"Masters, moments and gradients, in {unit}."
        charts.append(_single(group, "optimizer", held / divisor, "Optimizer memory", caption, floor=True, stepped=True))
    return charts


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def upper_chart(group: Group, inks: Inks) -> Chart:
    """The upper variable over time."""
    shown, rest = group.names[:MOST], group.names[MOST:]
    several = len(group.counted) > 1
    title = "Weights over time" if group.is_distribution else "Upper variable over time"
    if several:
        band = "the 95% interval of that mean (Student's t)" if len(group.counted) > 2 else "from the one to the other"
        caption = f"Line: mean over {len(group.counted)} seeds. Band: {band}."
    else:
        caption = "At the end: the 95% intervals that the run gives." if _has_intervals(group) else ""
    if rest:
        caption = f"{caption} The {len(rest)} smallest are grey, without a label.".strip()

    def draw(axes: Axes) -> list[Label]:
        labels = []
        rows = {row.name: row for row in upper_rows(group)}
        for name in [*rest, *reversed(shown)]:
            values = group.stacked("upper", name)
            ink = inks[name]
            colour = ink.colour if name in shown else LINE[0]
            steps = group.steps
            mean = values.mean(0)
            axes.plot(*thinned(steps, mean), color=colour, linewidth=1.9 if name in shown else 1.0, linestyle=ink.style)
            if name not in shown:
                continue
            if several:
                low, high = _band(values, clip=group.is_distribution)
                x, low = thinned(steps, low)
                axes.fill_between(x, low, thinned(steps, high)[1], color=colour, alpha=0.16, linewidth=0)
            elif rows[name].average.known:
                average = rows[name].average
                axes.vlines(steps[-1], average.low, average.high, color=colour, linewidth=3, alpha=0.5)
            labels.append(Label(name, float(mean[-1]), colour))
        _frame(axes, group)
        tidy(axes)
        if group.is_distribution:
            axes.set_ylim(bottom=0)
        return labels

    return Chart("upper", title, caption, draw, wide=True, height=280.0)


def _has_intervals(group: Group) -> bool:
    return bool(group.first.account and group.first.account.intervals)


def _curves(group: Group, key: str, names: Sequence[str], inks: Inks, title: str, caption: str) -> Chart:
    shown = names[:MOST]
    window = _window(group)
    alone = len(group.counted) == 1

    def draw(axes: Axes) -> list[Label]:
        labels = []
        for name in reversed(shown):
            values = group.stacked(key, name)
            steps = group.steps
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

    more = f" The {len(names) - MOST} smallest are not drawn." if len(names) > MOST else ""
    return Chart(key.replace("_", "-"), title, f"{caption} {_how_smoothed(group, window)}{more}".strip(), draw)


def _single(
    group: Group,
    key: str,
    values: NDArray[np.float64],
    title: str,
    caption: str,
    *,
    zero: bool = False,
    floor: bool = False,
    stepped: bool = False,
    log: bool = False,
) -> Chart:
    """One curve.

    zero: draw a line there. floor: the axis begins there. stepped: it jumps, so it is not smoothed. log: where the values
    span several orders of magnitude.
    """
    window = 1 if stepped else _window(group)

    def draw(axes: Axes) -> list[Label]:
        steps = group.steps
        if window > 1:
            for row in values:
                axes.plot(*thinned(steps, row), color=PLAIN, linewidth=0.7, alpha=0.22)
        mean = _mean_over_runs(values, window, _held(group))
        axes.plot(*thinned(steps, mean), color=PLAIN, linewidth=1.6, drawstyle="steps-mid" if stepped else "default")
        known = values[np.isfinite(values)]
        if log and known.min() > 0 and known.max() > 100 * known.min():
            axes.set_yscale("log")
        if zero:
            axes.axhline(0, color=MUTED[0], linewidth=0.8)
        _frame(axes, group)
        tidy(axes)
        if floor:
            axes.set_ylim(bottom=0)
        return []

    return Chart(key.replace("_", "-"), title, caption, draw, height=180.0)


def comparison_charts(comparison: Comparison) -> list[Chart]:
    """One chart for each metric: the differences with their intervals."""
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
    """The interval over runs at every step; the two values themselves if there are only two."""
    if len(values) == 2:
        return values.min(0), values.max(0)
    ends = [interval(values[:, step]) for step in range(values.shape[1])]
    low, high = np.array([i.low for i in ends]), np.array([i.high for i in ends])
    return (np.clip(low, 0, 1), np.clip(high, 0, 1)) if clip else (low, high)


def _mean_over_runs(values: NDArray[np.float64], window: int, held: int) -> NDArray[np.float64]:
    """The running mean of the mean over runs. The warm-up, whose steps are of another kind, is averaged by itself."""
    there = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        mean = np.where(there.any(0), np.where(there, values, 0.0).sum(0) / there.sum(0), np.nan)
    return np.concatenate([smoothed(part, window) for part in (mean[:held], mean[held:]) if len(part)])


def _held(group: Group) -> int:
    """The number of warm-up steps."""
    return group.first.warmup_steps


def _window(group: Group) -> int:
    """The window of the running mean: wide enough to show a trend despite minibatch noise, short enough to show a change."""
    return max(1, len(group.first.history) // 12) | 1


def _how_smoothed(group: Group, window: int) -> str:
    mean = f"running mean over {window} steps" if window > 1 else ""
    if len(group.counted) > 1:
        return f"Mean over {len(group.counted)} seeds{', ' + mean if mean else ''}."
    return f"Faint: every step; line: {mean}." if mean else ""


def _frame(axes: Axes, group: Group) -> None:
    """Set up the axis of the steps, with the warm-up shaded."""
    steps = int(group.steps[-1])
    held = int(group.steps[_held(group) - 1]) if _held(group) else 0
    axes.set_xlim(0, steps)
    axes.set_xlabel("step", color=MUTED[0], fontsize=FONT - 0.5, labelpad=2)
    axes.margins(y=0.08)
    if held:
        axes.axvspan(0, held, color=SHADE[0], zorder=0, linewidth=0)
        if held > 0.2 * steps:
            axes.annotate(
                "warm-up", (held / 2, 1.0), xycoords=("data", "axes fraction"), xytext=(0, -2), textcoords="offset points",
                ha="center", va="top", color=MUTED[0], fontsize=FONT - 1.5,
            )  # fmt: skip
