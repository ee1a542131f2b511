import re
from itertools import combinations

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from bilevel.palette import ACCENT, SERIES
from bilevel.report.charts import group_charts
from bilevel.report.drawing import Inks, shorten, spread, thinned
from bilevel.report.groups import group_runs
from bilevel.run_reader import read_run
from tests.bilevel.conftest import Make

# Machado, Oliveira and Fernandes 2009 (severity 1.0): what eyes without one kind of cone see, in linear RGB.
LACKING = {
    "none": np.eye(3),
    "red": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
    "green": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
    "blue": np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]),
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(colour: str) -> np.ndarray:
    c = np.array(to_rgb(colour))
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    ratio = XYZ @ np.clip(rgb, 0, 1) / (XYZ @ np.ones(3))
    f = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(a: str, b: str) -> float:
    """WCAG 2."""
    high, low = sorted(((XYZ @ linear(colour))[1] for colour in (a, b)), reverse=True)
    return float((high + 0.05) / (low + 0.05))


@pytest.mark.parametrize("lacking", sorted(LACKING))
@pytest.mark.parametrize("theme", [0, 1])
def test_colours_stay_apart_for_eyes_that_lack_a_cone(lacking: str, theme: int) -> None:
    """CIE76 above 10, where two colours are told apart at a glance."""
    seen = [lab(LACKING[lacking] @ linear(pair[theme])) for pair in SERIES]
    for (i, a), (j, b) in combinations(enumerate(seen), 2):
        assert np.linalg.norm(a - b) > 10, (SERIES[i][theme], SERIES[j][theme])


@pytest.mark.parametrize("pair", SERIES)
def test_labels_can_be_read(pair: tuple[str, str]) -> None:
    assert contrast(pair[0], "#ffffff") > 4.5
    assert contrast(pair[1], "#15171a") > 4.5


@pytest.mark.parametrize("background", ["#ffffff", "#000000"])
def test_a_bar_can_be_seen_on_any_background(background: str) -> None:
    assert contrast(ACCENT[0], background) > 3


def test_labels_are_spread_no_more_than_they_must() -> None:
    assert spread([0.9, 0.1], 0.1, 0, 1) == [0.9, 0.1]
    assert spread([0.5, 0.5], 0.1, 0, 1) == pytest.approx([0.45, 0.55])
    assert spread([0.0, 0.0, 0.01], 0.1, 0, 1) == pytest.approx([0.0, 0.1, 0.2])
    draw = np.random.default_rng(0)
    for _ in range(50):
        wanted = draw.uniform(size=7)
        places = np.array(spread(wanted.tolist(), 0.1, 0, 1))
        order = np.argsort(wanted)
        assert (np.diff(places[order]) >= 0.1 - 1e-9).all()
        assert places.min() >= -1e-9
        assert places.max() <= 1 + 1e-9


def test_labels_that_have_no_room_stay_in_their_order() -> None:
    assert spread([0.1, 0.9, 0.5], 0.5, 0, 1) == pytest.approx([0.0, 1.0, 0.5])


def test_long_names_keep_their_ends() -> None:
    assert shorten("short") == "short"
    assert shorten("instructions-english-v1", 12) == "instru…sh-v1"
    assert len(shorten("x" * 90, 18)) == 18


def test_thinning_keeps_means_and_gaps() -> None:
    x, y = np.arange(1000.0), np.where(np.arange(1000) < 500, np.nan, 2.0)
    few_x, few_y = thinned(x, y, 100)
    assert len(few_x) == 100
    assert np.isnan(few_y[:50]).all()
    assert (few_y[50:] == 2.0).all()


def test_names_beyond_the_palette_get_dashes_of_their_own() -> None:
    names = [f"s{i}" for i in range(20)]
    inks = Inks(names)
    assert len({(inks[name].colour, str(inks[name].style)) for name in names}) == 20


def test_a_source_has_one_colour_in_every_chart(make_run: Make) -> None:
    (group,) = group_runs([read_run(make_run(final={"web": 0.2, "books": 0.7, "chat": 0.1}))])
    inks = Inks(group.names)
    seen: dict[str, set[str]] = {}
    for chart in group_charts(group, inks):
        for colour, text in re.findall(
            r'<text style="[^"]*fill: (var\(--series-\d+\))[^"]*"[^>]*>([^<]+)</text>', chart.svg("a")
        ):
            seen.setdefault(text, set()).add(colour)
    assert {name: colours for name, colours in seen.items() if name in group.names} == {
        name: {f"var(--{inks[name].variable})"} for name in group.names
    }


def test_text_of_charts_stays_text_and_colours_are_the_themes(make_run: Make) -> None:
    (group,) = group_runs([read_run(make_run())])
    for chart in group_charts(group, Inks(group.names)):
        svg = chart.svg("a", wide=chart.wide)
        assert ">step</text>" in svg
        assert not re.findall(r"#[0-9a-f]{6}", svg), "a colour that does not follow the theme"


def test_pictures_are_png(make_run: Make) -> None:
    (group,) = group_runs([read_run(make_run())])
    assert group_charts(group, Inks(group.names))[0].png().startswith(b"\x89PNG")
