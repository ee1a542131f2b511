"""A format and an exporter of another package are used as the built-in ones are: one module and its registration each."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bilevel.account import Finding
from bilevel.errors import InputError
from bilevel.plugins import Plugins
from bilevel.record import Record
from bilevel_llm.data.format_contract import check_format
from bilevel_llm.data.reading import read_rows
from bilevel_llm.data.rows import Turn
from bilevel_llm.exporters.run import export
from bilevel_llm.mixing.draw import make_mix
from bilevel_llm.reweighting.saved_run import read_run
from bilevel_llm.reweighting.trust import Trust
from tests.bilevel_llm.third_party import Forum
from tests.bilevel_llm.tiny import alpaca, write_jsonl

MakeRun = Callable[..., Path]


def thread(number: int) -> dict[str, Any]:
    return {"thread": [{"by": "asker", "says": f"how {number}?"}, {"by": "helper", "says": f"so {number}"}]}


@pytest.fixture
def run(installed: Plugins, make_run: MakeRun) -> Path:
    return make_run({"web": [thread(i) for i in range(40)], "books": alpaca("books", 20), "chat": alpaca("chat", 10)})


@pytest.mark.usefixtures("installed")
def test_rows_of_another_format_are_recognized_and_read(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [thread(1)])
    expected = [(Turn("user", "how 1?"), Turn("assistant", "so 1"))]
    assert [row.turns for row in read_rows([str(file)])] == expected
    assert [row.turns for row in read_rows([str(file)], format="forum")] == expected


@pytest.mark.usefixtures("installed")
def test_rows_that_two_formats_claim_alike_are_refused_with_their_names(tmp_path: Path) -> None:
    both = {**thread(1), "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    file = write_jsonl(tmp_path / "a.jsonl", [both])
    with pytest.raises(
        InputError, match=r"a\.jsonl:1: the row may be in format 'messages' or 'forum': it has thread, messages"
    ):
        read_rows([str(file)])
    assert [row.turns[0].text for row in read_rows([str(file)], format="forum")] == ["how 1?"]


def test_a_source_of_another_format_is_mixed_as_messages(run: Path, installed: Plugins, tmp_path: Path) -> None:
    weighted = read_run(run, installed)
    make_mix(weighted.problem, weighted.weights, rows=10, format="messages").write(tmp_path / "mix.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "mix.jsonl").read_text().splitlines()]
    assert sum(row["messages"][0]["content"].startswith("how ") for row in rows) == 5  # half of the weight


def test_all_sources_are_mixed_in_another_format(run: Path, installed: Plugins, tmp_path: Path) -> None:
    weighted = read_run(run, installed)
    make_mix(weighted.problem, weighted.weights, rows=10, format="forum").write(tmp_path / "mix.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "mix.jsonl").read_text().splitlines()]
    assert [[post["by"] for post in row["thread"]] for row in rows] == [["asker", "helper"]] * 10
    listed = export(run, "shopping", installed, mix=tmp_path / "mix.jsonl")["list.txt"]
    assert listed == "1.00 mix.jsonl 10 rows of forum (thread of by and says), read by shopping-trainer 2.1\n"


def test_another_exporter_writes_sources_of_another_format(run: Path, installed: Plugins) -> None:
    listed = export(run, "shopping", installed, trainer_version="2.0")["list.txt"].splitlines()
    assert listed == [
        "0.50 web.jsonl 40 rows of forum (thread of by and says), read by shopping-trainer 2.0",
        "0.30 books.jsonl 20 rows of alpaca, read by shopping-trainer 2.0",
        "0.20 chat.jsonl 10 rows of alpaca, read by shopping-trainer 2.0",
    ]
    with pytest.raises(InputError, match="what shopping-trainer 1.0 reads is not known; known: >=2"):
        export(run, "shopping", installed, trainer_version="1.0")


def test_a_built_in_exporter_is_told_the_fields_and_names_of_another_format(run: Path, installed: Plugins) -> None:
    described = json.loads(export(run, "llamafactory", installed)["dataset_info.json"])["web"]
    assert described["formatting"] == "sharegpt"
    assert described["columns"] == {"messages": "thread"}
    assert described["tags"] == {
        "role_tag": "by", "content_tag": "says", "user_tag": "asker", "assistant_tag": "helper", "system_tag": "system",
    }  # fmt: skip
    with pytest.raises(InputError, match=r"'web' has rows of forum \(thread of by and says\), but 'books' of alpaca"):
        export(run, "trl", installed)


def test_the_format_keeps_the_contract() -> None:
    check_format(Forum(), [thread(1)])


def test_both_are_listed(installed: Plugins, capsys: pytest.CaptureFixture[str]) -> None:
    from bilevel.cli import list_parts

    list_parts()
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "format forum third_party tests.bilevel_llm.third_party:Forum" in lines
    assert "exporter shopping third_party tests.bilevel_llm.third_party:Shopping" in lines
    assert "exporter trl bilevel_llm bilevel_llm.exporters.trl:TRL" in lines


def test_a_finding_of_another_package_stands_among_our_own(installed: Plugins) -> None:
    history = [
        Record(
            t, 0.1, {"a": 0.5, "b": 0.3, "c": 0.2}, metrics={"gap": 0.0, "penalty": 1.0, "lower_loss": 2.0},
            parts={"gap_parts": {"a": -0.1, "b": 0.0, "c": 0.1}},
        )
        for t in range(40)
    ]  # fmt: skip
    found = {finding.name: finding for finding in Trust(history).findings}
    assert {"not-tested", "gap-open"} < found.keys()
    assert found["sources-counted"] == Finding("sources-counted", True, "there are 3 sources")
