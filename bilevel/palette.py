"""The colours of everything that is shown: charts and pages, notebooks, and bars on the terminal."""

# (light, dark). Any two stay apart for eyes that lack one kind of cone, and each can be read as text on its background.
SERIES = (
    ("#1460bc", "#58a9ff"),
    ("#cd331a", "#f69e5f"),
    ("#108159", "#37c496"),
    ("#8d487d", "#dc85cd"),
    ("#616d14", "#e3cc4e"),
    ("#403676", "#a8bfff"),
    ("#991f2b", "#ff7f89"),
    ("#6a555e", "#b6bfc4"),
)
ACCENT = SERIES[0]
"""Of what is drawn alone, such as bars. The light colour can be told from black (3.4 to 1) as well as from white (6.1 to 1),
so it is the one to use where the background is not known: on a terminal, in a notebook."""
INK = ("#1b1d21", "#e9eaec")
MUTED = ("#62666e", "#9da3ad")
LINE = ("#dcdee2", "#363a41")
SHADE = ("#f1f2f4", "#22252a")
THEME = {
    "ink": INK,
    "muted": MUTED,
    "line": LINE,
    "shade": SHADE,
    **{f"series-{i}": pair for i, pair in enumerate(SERIES, 1)},
}
"""CSS variable -> its colour in light and in dark."""
