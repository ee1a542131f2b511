import json
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from bilevel.cli import main
from bilevel.files import hidden
from bilevel.lock import owned
from tests.bilevel_llm.tiny import alpaca, write_jsonl

MakeRun = Callable[..., Path]


@pytest.fixture
def bilevel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """Runs the command in this process; returns its exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: Any) -> int:
        monkeypatch.setattr(sys, "argv", ["bilevel", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        return int(caught.value.code or 0)

    return run


def test_a_run_becomes_a_mix_a_card_and_a_table(
    make_run: MakeRun, bilevel: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    make_run()
    assert bilevel("mix", "run", "--rows", 100, "--output", "out/mix.jsonl", "--seed", 3) == 0
    lines = (tmp_path / "out" / "mix.jsonl").read_text().splitlines()
    assert len(lines) == 100
    card = json.loads((tmp_path / "out" / "mix.jsonl.json").read_text())
    assert card["weights"] == "run/weights.json (average)"
    assert card["recipe"] == "run/recipe.yaml"
    assert card["seed"] == 3
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert table[0] == ["source", "weight", "rows", "available", "rows", "drawn", "repeats", "tokens"]
    assert table[1][:5] == ["web", "0.500", "40", "50", "1.25"]
    assert table[3][:5] == ["chat", "0.200", "10", "20", "2.00"]
    assert table[4] == ["all", "70", "100", f"{card['tokens']:,}"]


def test_a_mix_that_another_process_writes_is_left_to_it_before_any_row_is_read(
    make_run: MakeRun, bilevel: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run()
    thread = Thread(target=lambda: codes.append(bilevel("mix", "none", "--rows", 9, "--output", "mix.jsonl")))
    codes: list[int] = []
    with owned(tmp_path / "mix.jsonl", file=True):
        thread.start()
        thread.join()
    assert codes == [2]
    assert "mix.jsonl is in use by process" in capsys.readouterr().err
    assert not list(tmp_path.glob(".*"))


def test_a_mix_that_was_killed_before_its_card_had_its_name_is_drawn_again(
    make_run: MakeRun, bilevel: Callable[..., int], tmp_path: Path
) -> None:
    make_run()
    draw = ("mix", "run", "--rows", 20, "--output", "mix.jsonl")
    assert bilevel(*draw) == 0
    mix, card = tmp_path / "mix.jsonl", tmp_path / "mix.jsonl.json"
    rows, facts = mix.read_bytes(), card.read_bytes()
    card.rename(hidden(card))
    assert bilevel(*draw) == 0
    assert (mix.read_bytes(), card.read_bytes()) == (rows, facts)
    card.unlink()  # without a card that is about them, the rows may be anybody's
    assert bilevel(*draw) == 2
    assert mix.read_bytes() == rows


def test_given_weights_and_tokens_go_into_parquet_as_messages(
    make_run: MakeRun, bilevel: Callable[..., int], tmp_path: Path
) -> None:
    from pyarrow import parquet

    make_run()
    (tmp_path / "w.json").write_text(json.dumps({"web": 0, "books": 1, "chat": 0}))
    options = ["--weights", "w.json", "--tokens", 300, "--output", "mix.parquet", "--format", "messages"]
    assert bilevel("mix", "run", *options) == 0
    rows = parquet.read_table(tmp_path / "mix.parquet").to_pylist()
    assert {row["_bilevel"]["source"] for row in rows} == {"books"}
    assert rows[0]["messages"][0]["role"] == "user"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "--rows", "5", "--tokens", "5", "--output", "m.jsonl"], "either in rows (--rows) or in tokens"),
        (["run", "--rows", "9999", "--output", "m.jsonl"], "at most --rows "),
        (["run", "--rows", "5", "--output", "m.txt"], "unknown type of file '.txt'"),
        (["run", "--rows", "5", "--output", "web.jsonl"], "web.jsonl exists, and nothing is overwritten"),
        (["away", "--rows", "5", "--output", "m.jsonl"], "away is not a run"),
        (["run", "--rows", "5", "--output", "m.jsonl", "--format", "massages"], "did you mean 'messages'?"),
        (["run", "--rows", "5"], "Missing option '--output'"),
    ],
)
def test_bad_input_ends_with_2_and_one_message(
    make_run: MakeRun,
    bilevel: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: Any,
    says: str,
) -> None:
    make_run()
    before = sorted(tmp_path.iterdir())
    assert bilevel("mix", *arguments) == 2
    assert says in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_changed_data_is_refused_unless_allowed(
    make_run: MakeRun, bilevel: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    make_run()
    write_jsonl(tmp_path / "web.jsonl", alpaca("web", 50))
    assert bilevel("mix", "run", "--rows", 5, "--output", "m.jsonl") == 2
    assert "the data of 'web' changed" in capsys.readouterr().err
    assert bilevel("mix", "run", "--rows", 5, "--output", "m.jsonl", "--allow-changed-data") == 0
