import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bilevel.cli import main
from bilevel.errors import InputError
from bilevel.terminal import Terminal
from bilevel.testing.session import NotApplicable, configure, plugins
from bilevel.verify.claims import Check, Reading, agreement, bound, exponent, number
from bilevel.verify.run import ClaimResult, VerificationReport, judge, measure, verify, write

FAST = ["closed-forms", "sfo-exponent"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["bilevel", *arguments])
    try:
        main()
    except SystemExit as exit:
        return int(exit.code or 0)
    return 0


@pytest.fixture(scope="module")
def report() -> VerificationReport:
    return verify(FAST, quick=True, processes=1)


def test_claims_that_hold_are_reported_with_what_was_measured(report: VerificationReport) -> None:
    assert report.holds
    console = Terminal(width=80, record=True, file=io.StringIO())
    console.print(report.table())
    text = console.export_text()
    assert "holds (" in text
    assert "[/]" not in text
    assert "best squared error, p = 2" in text
    assert "2509.02937" in text
    assert "derived" in text
    assert "…" in text
    assert "..." not in text
    assert f"{len(FAST)} claims: {len(FAST)} hold, in" in report.summary()


def test_everything_is_in_the_json_and_the_picture(report: VerificationReport, tmp_path: Path) -> None:
    write(report, picture=tmp_path / "verify.png", data=tmp_path / "verify.json")
    data = json.loads((tmp_path / "verify.json").read_text())
    assert data["holds"] is True
    assert [outcome["name"] for outcome in data["outcomes"]] == FAST
    reading = next(reading for reading in data["outcomes"][1]["readings"] if reading["curve"])
    assert reading["curve"]["fit"]["low"] <= reading["measured"] <= reading["curve"]["fit"]["high"]
    assert (tmp_path / "verify.png").read_bytes().startswith(b"\x89PNG")


def test_an_unknown_claim_is_an_input_error_that_names_the_nearest(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    with pytest.raises(InputError, match="penalty-bias"):
        verify(["penalty-bais"])
    assert run(monkeypatch, "verify", "penalty-bais") == 2
    assert "did you mean 'penalty-bias'" in capfd.readouterr().err


def test_a_claim_that_fails_makes_the_command_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: Any) -> None:
    from bilevel_theory.sfo_exponent import SFOExponent

    monkeypatch.setattr(SFOExponent, "readings", lambda self: iter([number("broken", 3.0, 2.0, 0.1, "a test")]))
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "verify", "sfo-exponent", "--quick") == 1
    assert "these claims do not hold: sfo-exponent" in capfd.readouterr().err
    assert (tmp_path / "verify.png").exists()


def test_a_solver_of_a_third_party_is_measured_on_the_claims_that_are_about_any() -> None:
    outcome = measure("shared-minibatch", True, "f2ba")
    assert outcome.verdict == "holds", outcome
    assert measure("f2sa-rate", True, "pbgd").verdict == "skipped"
    assert measure("penalty-bias", True, "aid").reason == "AID has no setting named penalty"


def test_claims_without_a_form_for_any_solver_are_counted_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bilevel.verify.run.measure", lambda name, quick, solver: judged(name))
    report = verify(quick=True, solver="meha", processes=1)
    assert [outcome.name for outcome in report.outcomes] == ["penalty-bias", "lower-distance", "shared-minibatch"]
    assert (
        "3 claims: 3 hold, in 0 s\n18 claims have no form for any solver, and were left out: closed-forms ("
        in report.summary()
    )
    assert "optimal-weights, interior-weights (about weights of sources)" in report.summary()


def judged(name: str) -> ClaimResult:
    return ClaimResult(name, "", "", "", "derived", 0, "holds", 0.0)


def test_an_unknown_solver_is_an_input_error() -> None:
    with pytest.raises(InputError, match="scalebio"):
        verify(FAST, solver="scalebo")


class Broken(Check):
    statement = hypotheses = source = ""
    standing = "derived"
    raises: type[BaseException] = ValueError

    def readings(self) -> Iterator[Reading]:
        raise self.raises("reason")


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (ValueError, "FAILS"),
        (InputError, "FAILS"),
        (RecursionError, "FAILS"),
        (MemoryError, "FAILS"),
        (SystemExit, "FAILS"),
        (GeneratorExit, "FAILS"),
        (ImportError, "skipped"),
        (NotApplicable, "skipped"),
    ],
)
def test_a_measurement_that_breaks_off_says_why(
    error: type[BaseException], verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Broken, "raises", error)
    found, readings, reason = judge(Broken())
    assert (found, list(readings)) == (verdict, [])
    assert "reason" in reason


def test_the_other_claims_go_on_when_a_solver_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    from bilevel_theory.sfo_exponent import SFOExponent

    def leave(self: Check) -> Iterator[Reading]:
        raise SystemExit("the solver gave up")

    monkeypatch.setattr(SFOExponent, "readings", leave)
    report = verify(["sfo-exponent", "closed-forms"], quick=True, processes=1)
    assert [(one.verdict, one.reason) for one in report.outcomes] == [
        ("FAILS", "SystemExit: the solver gave up"),
        ("holds", ""),
    ]


def test_a_reading_that_is_not_a_number_does_not_hold() -> None:
    import torch

    nan = float("nan")
    assert not number("", nan, 1.0, 0.1, "").holds
    assert not bound("", nan, 0.0, 1.0, "").holds
    assert not agreement("", torch.tensor([nan]), torch.ones(1), 0.1, "").holds
    assert number("", -1.05, -1.0, 0.1, "").holds


def test_an_exponent_can_be_right_while_the_constant_is_wrong() -> None:
    xs = [1.0, 10.0, 100.0]
    reading = exponent("", "x", xs, [2 / x for x in xs], -1, 0.05, "", exact=[1 / x for x in xs], allowed=1e-3)
    assert reading.measured == pytest.approx(-1)
    assert reading.deviation == pytest.approx(1)
    assert not reading.holds


def test_settings_that_a_solver_does_not_have_are_left_out() -> None:
    from bilevel import F2SA

    assert configure(F2SA, penalty=3.0, gamma=1.0).penalty == 3.0  # type: ignore[attr-defined]


def test_every_claim_says_what_it_is_about() -> None:
    for part in plugins().parts["checks"].values():
        check = part.load()
        assert all(getattr(check, name) for name in ("statement", "hypotheses", "source"))
        assert check.standing in ("proved", "derived")
        assert (check.__doc__ or "").strip()
