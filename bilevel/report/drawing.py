"""How charts look: one palette, labels beside the curves, text as text; SVG for a page that is light or dark, and PNG.

Figures are drawn in the light colours. In the SVG each becomes a CSS variable, which the page sets for light and dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from bilevel.palette import INK, LINE, MUTED, SERIES, THEME
from bilevel.plaintext import IN_MATPLOTLIB, on_one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

STYLES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))  # past the palette's end the dashes change, so that no two curves look the same
FONT = 12.0  # px at the chart's own size; a phone shows it at nine tenths of that


@dataclass(frozen=True)
class Ink:
    """The colour with which one name is drawn in every chart of a page."""

    colour: str
    style: Any
    variable: str


@dataclass(frozen=True)
class Inks:
    """The mapping of names to inks, in order of appearance."""

    names: Sequence[str]

    def __getitem__(self, name: str) -> Ink:
        place = self.names.index(name) if name in self.names else len(self.names)
        index = place % len(SERIES)
        return Ink(SERIES[index][0], STYLES[place // len(SERIES) % len(STYLES)], f"series-{index + 1}")


@dataclass
class Label:
    """The label beside the right end of a curve, at its value `y`."""

    text: str
    y: float
    colour: str


@dataclass(frozen=True)
class Chart:
    """One chart.

    name: the name of its file.
    caption: what is drawn, and how to read it.
    draw: draws into axes and returns the labels for the right-hand side.
    wide: whether the chart takes the whole width of the page, on wide screens.
    height: the height in px of a chart that is not wide.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[Axes], Sequence[Label]]
    wide: bool = False
    height: float = 210.0

    def svg(self, prefix: str, *, wide: bool = False) -> Markup:
        """The chart as inline SVG. prefix: the prefix of its ids, with which no other id of the page may begin."""
        buffer = io.StringIO()
        size = (1040.0, 330.0) if wide else (360.0, self.height)
        with _style():
            self._figure(*size).savefig(
                buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
            )
        return _for_page(buffer.getvalue(), f"{prefix}-{self.name}-{'wide' if wide else 'narrow'}", self.title)

    def png(self) -> bytes:
        """The chart as PNG on white, for slides and papers."""
        buffer = io.BytesIO()
        with _style():
            self.figure().savefig(buffer, format="png", dpi=160, facecolor="white")
        return buffer.getvalue()

    _repr_png_ = png  # which notebooks show

    def figure(self) -> Figure:
        """The chart as a figure of matplotlib, with its title."""
        with _style():
            return self._figure(*((760.0, 330.0) if self.wide else (520.0, max(290.0, self.height))), title=self.title)

    def _figure(self, width: float, height: float, title: str | None = None) -> Figure:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine

        layout = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03)
        figure = Figure(figsize=(width / 72, height / 72), dpi=72, facecolor="none")
        axes = figure.subplots()
        axes.set_facecolor("none")
        labels = list(self.draw(axes))
        texts = [_write(axes, label) for label in labels]
        if title:
            axes.set_title(on_one_line(title), loc="left", color=INK[0], fontsize=FONT + 2)
        layout.execute(figure)  # leaves room for the labels; once, as an engine of the figure's own would draw it once more
        _place(axes, labels, texts)
        return figure


def shorten(text: str, most: int = 18) -> str:
    """Shorten a name so that it fits beside a chart. The middle is dropped, since similar names differ at their ends."""
    text = on_one_line(text)
    tail = most // 2 - 1
    return text if len(text) <= most else f"{text[: most - tail - 1]}…{text[-tail:]}"


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places as near to the wanted ones as can be, in their order, at least `gap` apart and within [low, high].

    Least squares under these constraints: pool what collides at its mean (isotonic regression by pooling of adjacent
    violators, Barlow et al. 1972), on the places less the room that each needs.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    pools: list[tuple[float, int]] = []
    for rank, i in enumerate(order):
        pools.append((wanted[i] - rank * gap, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (b, m), (a, n) = pools.pop(), pools.pop()
            pools.append(((a * n + b * m) / (n + m), n + m))
    top = max(low, high - (len(wanted) - 1) * gap)
    flat = [min(max(value, low), top) for value, size in pools for _ in range(size)]
    places = [0.0] * len(wanted)
    for rank, i in enumerate(order):
        places[i] = flat[rank] + rank * gap
    return places


def tidy(axes: Axes, *, ticks: int = 4) -> None:
    """Few ticks, thin horizontal lines, no box."""
    from matplotlib.ticker import MaxNLocator

    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(LINE[0])
    axes.grid(axis="y", color=LINE[0], linewidth=0.7)
    axes.set_axisbelow(True)
    axes.minorticks_off()
    axes.tick_params(left=False, bottom=False, pad=5, labelcolor=MUTED[0], labelsize=FONT - 0.5)
    if axes.get_yscale() == "linear":
        axes.yaxis.set_major_locator(MaxNLocator(ticks))
        axes.ticklabel_format(axis="y", useOffset=False, style="plain")
    else:
        axes.yaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def thinned(x: NDArray[Any], y: NDArray[Any], most: int = 360) -> tuple[NDArray[Any], NDArray[Any]]:
    """Means over stretches of steps, if there are more points than a chart has pixels."""
    if len(x) <= most:
        return x, y
    parts = np.array_split(np.arange(len(x)), most)
    known = [part[np.isfinite(y[part])] for part in parts]
    return np.array([x[part].mean() for part in parts]), np.array([y[k].mean() if len(k) else np.nan for k in known])


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context({
        "svg.fonttype": "none",  # text stays text: small, selectable, in the page's own font
        "svg.hashsalt": "bilevel",  # the same runs give the same file
        **IN_MATPLOTLIB,  # a source may be called $5_off$
        "font.family": "sans-serif",
        "font.size": FONT,
        "axes.unicode_minus": True,
        "path.simplify": True,
    }):  # fmt: skip
        yield


def _write(axes: Axes, label: Label) -> Annotation:
    """Write the label to the right of the plot."""
    return axes.annotate(
        shorten(label.text), (1.0, 0.5), xycoords="axes fraction", xytext=(14, 0), textcoords="offset points",
        color=label.colour, fontsize=FONT, va="center", ha="left", annotation_clip=False,
    )  # fmt: skip


def _place(axes: Axes, labels: Sequence[Label], texts: Sequence[Annotation]) -> None:
    """Bring each label to the height of its curve, apart from the others, and join the two by a hairline."""
    box = axes.get_window_extent()
    to_fraction = axes.transData + axes.transAxes.inverted()
    at = [float(to_fraction.transform((0.0, label.y))[1]) for label in labels]
    gap = FONT * 1.22 / box.height
    places = spread(at, gap, gap / 3, 1 - gap / 3)
    right = 14 / box.width
    for text, label, start, end in zip(texts, labels, at, places, strict=True):
        text.xy = (1.0, end)
        axes.plot(
            [1 + 0.15 * right, 1 + 0.8 * right], [start, end], transform=axes.transAxes, color=label.colour, linewidth=0.8,
            alpha=0.6, clip_on=False, scalex=False, scaley=False,
        )  # fmt: skip


def _for_page(svg: str, prefix: str, title: str) -> Markup:
    """Make an SVG file part of a page: without a fixed size, with ids of its own and the page's font and colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # it would hold for the page
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r' (xmlns:xlink|version|xmlns)="[^"]*"', "", svg, count=3)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)  # nothing refers to a group
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = svg.replace("url(#", f"url(#{prefix}-").replace('href="#', f'href="#{prefix}-')
    svg = re.sub(r"font: (?:[\w ]+ )?([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    for variable, (light, _) in THEME.items():
        svg = svg.replace(light, f"var(--{variable})")
    svg = re.sub(r"\n\s*", "\n", svg)
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{Markup.escape(title)}"', 1))
