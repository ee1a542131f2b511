"""The page in a real browser: it fits the window, in light and in dark, and something is on it. Run by `make test-browser`."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from bilevel.report.page import read, write
from tests.bilevel.conftest import Make

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
# A window is never narrower than some 500 px, a frame is; and what is in it can be measured from outside.
FRAME = """<!doctype html><style>html, body {{ margin: 0 }} iframe {{ border: 0; display: block }}</style>
<iframe src="{page}" width="{width}" height="{height}"></iframe>
<script>
document.querySelector("iframe").onload = (event) => {{
  const root = event.target.contentDocument.documentElement;
  document.body.dataset.measured = [root.clientWidth, root.scrollWidth, root.scrollHeight].join(" ");
  const cells = [...event.target.contentDocument.querySelector("table.stack tr:has(.named)").querySelectorAll("td[data-label]")];
  document.body.dataset.cells = cells.map((cell) => cell.getBoundingClientRect().top).join(" ");
}};
</script>"""

pytestmark = pytest.mark.browser


@pytest.fixture
def page(make_run: Make, make_comparison: Callable[..., Path], tmp_path: Path) -> Path:
    """Everything that can be wide: long names, many sources, several recipes, a comparison, deep paths and hashes."""
    names = ["a-source-with-a-very-long-name-without-any-space-in-it", *(f"source-{i}" for i in range(13))]
    final = dict(zip(names, np.random.default_rng(0).dirichlet(np.ones(14)).tolist(), strict=True))
    runs = [make_run("seed-0", final=final), make_run("seed-1", seed=1, final=final), make_run("other", penalty=20.0)]
    write(read([*runs, make_run("empty", steps=0, penalty=30.0), make_comparison()]), output=tmp_path / "report.html")
    return tmp_path / "report.html"


def browse(*options: str, where: Path) -> str:
    assert BROWSER is not None, f"no browser on PATH ({', '.join(NAMES)}); Debian's package is chromium"
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files",
               f"--user-data-dir={where.parent / 'profile'}", *options, where.as_uri()]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(360, 800), (1280, 900)])
def test_the_page_fits_the_window_and_is_not_blank(page: Path, width: int, height: int, dark: bool) -> None:
    frame, picture = page.with_name("frame.html"), page.with_name("picture.png")
    frame.write_text(FRAME.format(page=page.as_uri(), width=width, height=height))
    options = [f"--window-size={max(width, 600)},{height}", *(["--blink-settings=preferredColorScheme=0"] if dark else [])]

    measured = re.search(r'data-measured="(\d+) (\d+) (\d+)"', browse(*options, "--dump-dom", where=frame))
    assert measured, "the page did not load"
    client, scroll, tall = map(int, measured.groups())
    assert client == width
    assert scroll <= client, f"the page is {scroll} px wide in a window of {client} px"
    assert tall > height

    browse(*options, f"--screenshot={picture}", where=frame)
    shown = matplotlib.image.imread(picture)[:height, :width, :3]
    background = np.median(shown.reshape(-1, 3), axis=0)
    assert (background.mean() < 0.3) == dark
    different = (np.abs(shown - background).max(axis=2) > 0.2).mean()
    assert 0.01 < different < 0.5, f"{different:.2%} of the picture is not background"
    assert len(np.unique((shown * 8).astype(int).reshape(-1, 3), axis=0)) > 20, "no colours"


def test_the_numbers_of_a_source_stand_in_one_row_on_a_phone(page: Path) -> None:
    frame = page.with_name("frame.html")
    frame.write_text(FRAME.format(page=page.as_uri(), width=360, height=800))
    found = re.search(r'data-cells="([^"]+)"', browse("--window-size=600,800", "--dump-dom", where=frame))
    assert found, "the page did not load"
    tops = found[1].split()
    assert len(tops) == 3
    assert len(set(tops)) == 1, f"average, interval and last step are {tops} px from the top"
