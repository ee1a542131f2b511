import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bilevel import Finding, Labels, Record, ScaleBiO, Table, fit
from bilevel.account import RUN, Account, NextStep, Verdict
from bilevel.answer import REPORT
from bilevel.cli import app
from bilevel.errors import InputError
from bilevel.report.findings import upper_rows
from bilevel.report.page import html, number, read, span, write
from bilevel.statistics import Interval
from bilevel_backends.torch_backend import TorchBackend
from bilevel_llm.reweighting.problem import LLMReweighting
from tests.bilevel.conftest import Make
from tests.conftest import Distance

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Tags with their attributes, the text, and whether tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.stack: list[str] = []
        self.text = ""
        self.outside: list[str] = []
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table" and "scroll" not in [dict(attrs).get("class") for _, attrs in self.boxes()]:
            self.outside.append(tag)
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1] != "style":
            self.text += data

    def boxes(self) -> list[tuple[str, list[tuple[str, str | None]]]]:
        return [(tag, list(attrs.items())) for tag, attrs in self.tags[-2:]]


def page(*paths: Path) -> tuple[str, Page]:
    text = html(read(paths))
    return text, Page(text)


def test_the_page_needs_nothing_from_outside_and_runs_nothing(make_run: Make, make_comparison: Callable[..., Path]) -> None:
    text, parsed = page(make_run("a"), make_run("b", seed=1), make_run("c", penalty=20.0), make_comparison())
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in parsed.tags}
    for tag, attributes in parsed.tags:
        assert not any(name.startswith("on") for name in attributes), tag
        assert all(not (attributes.get(key) or "#").startswith(("http", "//", "data", "file")) for key in ("href", "src"))
    assert re.findall(r"url\((?!#)", text) == []
    assert "@import" not in text
    assert "https:" not in text
    assert "http:" not in text
    policy = next(a["content"] for t, a in parsed.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_the_page_fits_a_phone(make_run: Make, make_comparison: Callable[..., Path]) -> None:
    _, parsed = page(make_run("a"), make_run("b", penalty=20.0), make_comparison())
    viewport = next(a["content"] for t, a in parsed.tags if t == "meta" and a.get("name") == "viewport")
    assert viewport == "width=device-width, initial-scale=1"
    assert parsed.outside == [], "a table outside a box that scrolls"
    for tag, attributes in parsed.tags:
        assert tag != "svg" or {"width", "height"}.isdisjoint(attributes), "a chart of fixed size"


def test_ids_are_unique_and_every_reference_has_its_target(make_run: Make) -> None:
    text, parsed = page(make_run("a"), make_run("b", penalty=20.0))
    ids = Counter(attributes["id"] for _, attributes in parsed.tags if "id" in attributes)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    assert used
    assert used <= ids.keys()
    assert max(ids.values()) == 1


def test_names_are_text_whatever_they_contain(make_run: Make) -> None:
    evil, money = "<script>alert(1)</script>", "$\\frac$&amp;"
    text, parsed = page(
        make_run(final={evil: 0.5, money: 0.3, "--><b>": 0.2}, findings=[Finding("odd", True, f"{evil} & more")])
    )
    assert "<script" not in text
    assert "<b>" not in text
    assert not any(tag in ("script", "b") for tag, _ in parsed.tags)
    assert evil in parsed.text
    assert money in parsed.text
    assert f"{evil} & more" in parsed.text


def test_what_the_run_knows_is_on_the_page(make_run: Make) -> None:
    moving = Finding("still-moving", True, "still moving: the weight of 'web' changed by +0.200")
    text, parsed = page(make_run("my-mix", seed=7, findings=[moving]))
    for words in ("my-mix", "seed 7", "complete, 40 steps", "still moving", "1,234", "penalty: 10.0", "ab" * 32, "2.13.0"):
        assert words in parsed.text, words
    assert 'class="flag"' in text
    titles = re.findall(r"<h3>(.*?)</h3>", text)
    assert titles == [
        "Weights over time", "Training loss by source", "Validation loss by set", "Penalty gap by source", "Penalty gap",
        "Gradient norm of x", "Throughput", "Seconds per step", "Optimizer memory", "Training data",
    ]  # fmt: skip
    assert "<dt>Penalty</dt><dd>10</dd>" in text  # it never changed, so that a chart would show a flat line


def test_weights_stand_in_the_table_with_their_interval(make_run: Make) -> None:
    report = read([make_run("a"), make_run("b", seed=1), make_run("c", seed=2)])
    for row in upper_rows(report.groups[0]):
        assert (
            f'data-label="average">{number(row.average.mean)}</td><td class="n quiet" data-label="95% interval">{span(row.average)}</td>'
            in html(report)
        )
    assert "Means over 3 seeds" in html(report)


def test_several_recipes_stand_side_by_side_with_what_differs(make_run: Make) -> None:
    _, parsed = page(make_run("a"), make_run("b", penalty=20.0))
    assert "Recipes side by side" in parsed.text
    assert "solver.penalty" in parsed.text
    assert "penalty 20.0" in parsed.text


def test_a_comparison_is_shown_with_intervals_and_verdicts(make_comparison: Callable[..., Path]) -> None:
    _, parsed = page(make_comparison())
    for words in (
        "uniform",
        "2.320",
        "[2.295, 2.345]",
        "−0.090",
        "[−0.120, −0.060]",
        "better",
        "not told apart",
        "100,000",
        "61 s",
    ):
        assert words in parsed.text, words


@pytest.mark.parametrize("findings", [None, ()])
def test_a_run_without_an_account_of_itself_is_shown(make_run: Make, findings: tuple[Finding, ...] | None) -> None:
    _, parsed = page(make_run(findings=findings))
    assert "Weights over time" in parsed.text


def test_a_run_without_steps_is_said_to_have_none(make_run: Make) -> None:
    _, parsed = page(make_run(steps=0))
    assert "no step of 40 done" in parsed.text
    assert "nothing to draw" in parsed.text
    assert "penalty: 10.0" in parsed.text  # the recipe is there all the same


def test_a_run_that_only_warmed_up_is_shown(make_run: Make) -> None:
    _, parsed = page(make_run(steps=5))
    assert "incomplete, 5 of 40 steps" in parsed.text


def test_any_problem_can_be_reported(tmp_path: Path) -> None:
    """Real records, of an upper variable that is no set of weights."""
    for seed in (0, 1):
        fit(Distance(noise=0.1), ScaleBiO(penalty=5.0, lr_x=0.04, lr_z=0.3, warmup=0), TorchBackend(device="cpu"), steps=30,
            seed=seed, output=tmp_path / f"seed-{seed}")  # fmt: skip
    _, parsed = page(tmp_path / "seed-0", tmp_path / "seed-1")
    for words in ("Upper variable over time", "Upper loss", "Lower loss", "Penalty gap"):
        assert words in parsed.text
    assert "Means over 2 seeds" in parsed.text
    assert "x2" in parsed.text
    for word in ("token", "source", "validation", "training"):
        assert word not in parsed.text.lower().replace("training mix", ""), word


def test_a_problem_says_what_its_numbers_are_called_and_brings_its_own_tables_and_findings(tmp_path: Path) -> None:
    class Told(Distance):
        labels = Labels(upper="coordinate", lower_loss="distance from home")

        def findings(self, history: Sequence[Record]) -> list[Finding]:
            return [Finding("lost", True, "lost: more than a mile from home")]

        def tables(self, history: Sequence[Record]) -> list[Table]:
            return [Table("Landmarks <here>", ("landmark", "miles"), [("oak", 1234), ("well", 0.5), ("gate", None)])]

    solver = ScaleBiO(penalty=5.0, lr_x=0.04, lr_z=0.3, warmup=0)
    for seed in (0, 1):
        fit(Told(noise=0.1), solver, TorchBackend(device="cpu"), steps=10, seed=seed, output=tmp_path / f"s{seed}")
    text, parsed = page(tmp_path / "s0", tmp_path / "s1")
    for words in ("coordinate", "Distance from home", "Landmarks <here>", "1,234", "0.500", "flagged in 2 of 2 runs"):
        assert words in parsed.text, words
    assert text.count("Landmarks &lt;here&gt;</h3>") == 1  # the same in both runs


def test_a_real_reweighting_run_can_be_reported(problem: Callable[..., LLMReweighting], tmp_path: Path) -> None:
    solver = ScaleBiO(penalty=2.0, lr_x=0.1, lr_z=1e-3, warmup=2)
    fit(problem(), solver, TorchBackend(device="cpu"), steps=24, output=tmp_path / "run")
    learned = json.loads((tmp_path / "run" / "weights.json").read_text())
    assert {finding["name"]: finding["flagged"] for finding in learned["findings"]}["few-rows"]  # 30 rows
    text, parsed = page(tmp_path / "run")
    assert "few validation rows" in parsed.text
    assert "tokens/s" in parsed.text
    assert re.findall(r"<h3>(.*?)</h3>", text)[-2:] == ["Training data", "Validation data"]
    for name in ("clean", "other", "noise"):
        assert name in parsed.text


def test_the_same_runs_give_the_same_page(make_run: Make) -> None:
    now = datetime(2026, 1, 2, 3, 4)
    paths = [make_run("a"), make_run("b", seed=1)]
    assert html(read(paths, now=now)) == html(read(paths, now=now))


def test_pictures_are_written_too_and_leave_the_runs_own_alone(make_run: Make, tmp_path: Path) -> None:
    run = make_run()
    (run / "weights.png").write_bytes(b"the run's")
    written = write(read([run]), output=tmp_path / "report.html", pictures=run)
    assert written[0] == tmp_path / "report.html"
    assert len(written) == 10
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written[1:])
    assert (run / "weights.png").read_bytes() == b"the run's"


def test_a_report_is_renewed_and_nothing_else_replaced(make_run: Make, tmp_path: Path) -> None:
    report = read([make_run()])
    write(report, output=tmp_path / "report.html")
    write(report, output=tmp_path / "report.html")
    (tmp_path / "mine.html").write_text("<p>mine</p>")
    with pytest.raises(InputError, match="was not written by `bilevel report`"):
        write(report, output=tmp_path / "mine.html")
    assert (tmp_path / "mine.html").read_text() == "<p>mine</p>"


def test_the_command_writes_the_page(make_run: Make, tmp_path: Path) -> None:
    output = tmp_path / "out.html"
    done = CliRunner().invoke(app, ["report", str(make_run()), "--output", str(output), "--png", str(tmp_path / "png")])
    assert done.exit_code == 0, done.output
    assert "Weights over time" in output.read_text()
    assert (tmp_path / "png" / "report-upper.png").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing"], "is not a directory"),
        (["empty"], "holds no run"),
        (["run", "run"], "is named twice"),
        (["run", "--output", "empty"], "is a directory; name a file"),
        (["run", "--output", "nowhere/report.html"], "there is no directory nowhere"),
        (["run", "--png", "file"], "is a file; name a directory"),
    ],
)
def test_bad_input_is_refused_with_what_to_do(
    make_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    make_run()
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["report", *arguments])
    assert isinstance(result.exception, InputError)  # main() turns it into exit code 2
    assert words in str(result.exception)
    assert not (tmp_path / "report.html").exists()


def test_the_answer_stands_on_top_verdict_weights_and_commands(make_run: Make) -> None:
    run = make_run()
    account = Account.read(run / "account.json")
    steps = [NextStep("draw a mix", ("bilevel", "mix", RUN, "--rows", "5")), REPORT]
    decided = replace(account, verdict=Verdict("use", "they are good"), next_steps=steps)
    (run / "account.json").write_text(decided.to_json())
    _, shown = page(run)
    words = ["use these weights: they are good", "web", "draw a mix", f"bilevel mix {run} --rows 5", "settled: no weight"]
    places = [shown.text.index(word) for word in words]
    assert places == sorted(places)
    assert "bilevel report " not in shown.text.replace("Made by bilevel report", "")


def test_on_a_phone_the_rows_of_tables_are_stacked_and_every_cell_says_what_it_is(
    make_run: Make, make_comparison: Callable[..., Path]
) -> None:
    text, _ = page(make_run(), make_comparison())
    assert re.search(r"@media \(max-width: 29\.99rem\) \{\s*\.stack, \.stack tbody \{ display: block; \}", text)
    stacked = re.findall(r'<table class="stack">(.*?)</table>', text, re.DOTALL)
    assert len(stacked) == 4  # weights, training data, scores, differences
    for table in stacked:
        cells = re.findall(r"<td([^>]*)>([^<]*)", table)
        assert [attributes for attributes, value in cells if value.strip() and "data-label=" not in attributes] == []


def test_a_chart_without_a_caption_has_no_empty_one(make_run: Make) -> None:
    assert not re.search(r"<figcaption>\s*</figcaption>", page(make_run(findings=()))[0])


@pytest.mark.parametrize(
    ("low", "high", "shown"),
    [(0.00094, 0.414, "[0.001, 0.414]"), (-0.5, 0.0004, "[−0.500, 0.000]"), (0.0001, 0.0002, "[0.0001, 0.0002]")],
)
def test_both_ends_of_an_interval_have_as_many_decimals(low: float, high: float, shown: str) -> None:
    assert span(Interval((low + high) / 2, low, high)) == shown
