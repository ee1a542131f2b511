"""`weights.png`: the upper variable over time, the losses, and the penalty gap. `losses.png` if nothing is upper."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bilevel.files import write_atomic
from bilevel.hookspecs import hookimpl
from bilevel.plaintext import IN_MATPLOTLIB, on_one_line
from bilevel.record import thinned, warmup_steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from bilevel.account import Labels
    from bilevel.record import Record
    from bilevel.run import Run

log = logging.getLogger("bilevel")

MOST_POINTS = 2000  # of a curve: twice what the picture's width can show
MOST_CURVES = 20  # the number of colours in matplotlib's largest qualitative map


class PlotLogger:
    """Draws the run when it ends, complete or not."""

    @hookimpl
    def bilevel_run_end(self, run: Run) -> None:
        """Draw and write the picture. A run is not failed by a disk without room for it."""
        if run.output is not None and run.history:
            name = "weights.png" if run.history[0].upper else "losses.png"
            try:
                write_atomic(run.output / name, draw(thinned(run.history, MOST_POINTS), run.problem.labels))
            except OSError as error:
                log.warning("%s is not drawn: %s", run.output / name, error.strerror or error)


def draw(history: Sequence[Record], labels: Labels) -> bytes:
    """The picture of a history, as PNG."""
    from matplotlib import rc_context

    with rc_context(IN_MATPLOTLIB):
        return _draw(history, labels)


def _draw(history: Sequence[Record], labels: Labels) -> bytes:
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    names = list(history[0].upper)[:MOST_CURVES]
    heights = {
        "upper": 3 if names else 0,
        "losses": 2,
        "gap": 2 if any("gap" in record.metrics for record in history) else 0,
    }
    shown = {panel: height for panel, height in heights.items() if height}  # training alone has no upper variable, no gap
    figure = Figure(figsize=(8, 1.3 * sum(shown.values())), layout="constrained")
    axes = figure.subplots(len(shown), 1, sharex=True, height_ratios=list(shown.values()), squeeze=False)[:, 0]
    panels = dict(zip(shown, axes, strict=True))
    held = warmup_steps(history)
    if (upper := panels.get("upper")) is not None:
        colours = colormaps["tab10" if len(names) <= 10 else "tab20"](range(len(names)))
        steps = [record.step for record in history]
        curves = [
            upper.plot(steps, [record.upper[name] for record in history], color=colour)[0]
            for name, colour in zip(names, colours, strict=True)
        ]
        upper.set_ylabel("upper variable")
        upper.legend(
            curves,
            [on_one_line(name) for name in names],  # given here, as a label that begins with an underscore would be left out
            loc="center left",
            bbox_to_anchor=(1, 0.5),
            frameon=False,
            fontsize="small",
        )
        if held:
            upper.set_title(f"upper variable held during the first {held} steps (grey)", fontsize="small", loc="left")
    for key, label in (("upper_loss", labels.upper_loss), ("lower_loss", labels.lower_loss)):
        _curve(panels["losses"], history, key, label)
    panels["losses"].set_ylabel("loss")
    panels["losses"].legend(frameon=False, fontsize="small")
    if (gap := panels.get("gap")) is not None:
        _curve(gap, history, "gap", "g(y) − g(z)")
        gap.axhline(0, color="0.8", linewidth=0.8)
        gap.set_ylabel("penalty gap")
    axes[-1].set_xlabel("step")
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        if held:
            panel.axvspan(0, held, color="0.93", zorder=0)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _curve(axes: Axes, history: Sequence[Record], key: str, label: str) -> None:
    points = [(record.step, record.metrics[key]) for record in history if key in record.metrics]
    if points:
        axes.plot(*zip(*points, strict=True), label=label)


logger = PlotLogger()
