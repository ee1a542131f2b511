"""Near-duplicates: which pairs are found, how many are missed, and what is said of them."""

import importlib.util
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bilevel_llm.data import near_duplicates as module
from bilevel_llm.data.near_duplicates import (
    BANDS,
    PERMUTATIONS,
    SIMILAR,
    Rows,
    find_near_duplicates,
    report_near_duplicates,
    rows_of_files,
    rows_of_table,
    shingles_of,
    similarity,
)
from bilevel_llm.data.rows import Row, Turn
from bilevel_llm.data.settings import DataFiles, Source, ValidationSet
from bilevel_llm.data.tokens import tokenize
from tests.bilevel_llm.tiny import make_tokenizer, write_jsonl

WORDS = [f"w{i}" for i in range(3000)]


def row(text: str, where: str = "a:1") -> Row:
    question, _, answer = text.partition("|")
    return Row((Turn("user", question), Turn("assistant", answer)) if answer else (Turn("text", text),), where)


def given(rows: list[Row]) -> Rows:
    def read(numbers: np.ndarray | None) -> Iterator[Row]:
        yield from rows if numbers is None else (rows[i] for i in numbers)

    return Rows([row.where + "".join(turn.text for turn in row.turns) for row in rows], len(rows), read)


def found(train: list[Row], targets: list[Row], tmp_path: Path) -> module.NearDuplicates:
    return find_near_duplicates({"web": given(train)}, {"target": given(targets)}, tmp_path / "kept")


TEXT = "the cat sat on the mat and the dog ran after a small red ball that lay under the old table"


@pytest.mark.parametrize(
    ("other", "near"),
    [
        (TEXT.replace("mat", "rug"), True),
        (TEXT.upper().replace("TABLE", "CHAIR"), True),
        (TEXT + "!", True),  # only words count; `overlap` calls this another row
        ("the cat sat on the mat and the dog|" + TEXT[35:], True),  # roles do not
        (TEXT.replace("mat", "rug").replace("small", "big").replace("old", "new"), False),
        (TEXT, False),  # equal rows are not near, they are the same
        (" ".join(reversed(TEXT.split())), False),
        ("", False),
    ],
)
def test_rows_are_near_if_they_share_most_runs_of_three_words(tmp_path, other, near):
    assert bool(found([row(other)], [row(TEXT)], tmp_path)) is near


def test_a_system_prompt_that_all_rows_share_makes_none_of_them_alike():
    prompt = Turn("system", TEXT)
    one, other = (
        Row((prompt, Turn("user", q), Turn("assistant", a)), "a:1") for q, a in (("why so", "due to x"), ("how", "by y"))
    )
    assert similarity(shingles_of(one), shingles_of(other)) == 0


def test_characters_are_words_where_a_script_has_no_spaces():
    one, other = (row(f"東京は日本の首都であり世界最大級の{end}です") for end in ("都市", "都会"))
    assert similarity(shingles_of(one), shingles_of(other)) > SIMILAR
    assert len(shingles_of(row("yes"))) == 1
    assert len(shingles_of(row("?!"))) == 0


def test_misses_are_as_rare_as_stated_and_nothing_is_reported_wrongly(tmp_path):
    """Made-up pairs around the threshold, of independent texts and of one text: (1 - s^4)^64 < 3e-8 are missed."""
    assert (1 - SIMILAR ** (PERMUTATIONS // BANDS)) ** BANDS < 3e-8
    draw = random.Random(0)
    targets, train, alike = [], [], []
    for number in range(160):
        words = draw.choices(WORDS, k=60)
        targets.append(row(" ".join(words), f"target:{number}"))
        for place in draw.sample(range(60), draw.randint(2, 7)):
            words[place] = draw.choice(WORDS)
        train.append(row(" ".join(words), f"web:{number}"))
        alike.append(similarity(shingles_of(train[-1]), shingles_of(targets[-1])))
    train += [row(" ".join(draw.choices(WORDS[:300], k=60)), f"web:{number}") for number in range(160, 260)]
    index = module._Index(targets)
    reported = {int(one.where[4:]): index.nearest(one) for one in train}
    above = {number for number, s in enumerate(alike) if s >= SIMILAR}
    assert len(above) > 40
    assert sum(SIMILAR - 0.1 < s < SIMILAR for s in alike) > 20
    assert {number for number, other in reported.items() if other is not None} == above
    assert all(reported[number] == (f"target:{number}", alike[number]) for number in above)
    of_one = module._Index([row(TEXT)])
    assert all(of_one.nearest(row(TEXT.replace("mat", f"w{i}"))) for i in range(100))


def test_what_is_found_is_counted_shown_and_remembered(tmp_path, monkeypatch):
    train = [row(TEXT.replace("mat", word), f"web:{i}") for i, word in enumerate(("rug", "bed", "sofa", "floor"))]
    result = found([*train, row("of other things", "web:9")], [row(TEXT, "target:5")], tmp_path)
    assert result.train == {"web": 4}
    assert [(here, there) for here, there, _ in result.examples["web"]] == [(f"web:{i}", "target:5") for i in range(3)]
    assert "4 in web (web:0 ≈ target:5, 0.7" in str(result)
    monkeypatch.setattr(module, "_find", lambda *_: pytest.fail("it is looked for again"))
    assert found([*train, row("of other things", "web:9")], [row(TEXT, "target:5")], tmp_path) == result
    monkeypatch.undo()
    (kept,) = (file for file in (tmp_path / "kept").iterdir() if file.suffix == ".json")
    kept.write_text("{")
    assert found([*train, row("of other things", "web:9")], [row(TEXT, "target:5")], tmp_path) == result
    assert found(train[:1], [row(TEXT, "target:5")], tmp_path).train == {"web": 1}, "other rows are looked at anew"


def test_of_many_rows_a_sample_is_looked_at_and_the_message_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST_TRAINING", 20)
    rows = [row(TEXT.replace("mat", f"w{i}"), f"web:{i}") for i in range(60)]
    others = {"web": given(rows), "books": given(rows[:20])}
    result = find_near_duplicates(others, {"t": given([row(TEXT)])}, tmp_path / "kept")
    assert result.train == {"web": 15, "books": 5}
    assert "15 of 15 rows, a sample of 60, in web" in str(result)


def test_rows_of_tables_and_of_files_are_read_with_their_columns(tmp_path):
    rows = [{"q": f"{i} {TEXT}", "a": "yes"} for i in range(9)]
    data = DataFiles(str(write_jsonl(tmp_path / "a.jsonl", rows)), fields={"prompt": "q", "response": "a"})
    table = tokenize(data, make_tokenizer(), max_length=400)
    whole = [one.turns[0].text for one in rows_of_table(table, data).read(None)]
    assert whole == [one["q"] for one in rows] == [one.turns[0].text for one in rows_of_files(data).read(None)]
    assert [one.where[-1] for one in rows_of_table(table, data).read(np.array([1, 4]))] == ["2", "5"]


def test_without_the_library_this_is_said_once_and_is_no_warning(tmp_path, monkeypatch, caplog):
    really = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "datasketch" else really(name, *a))
    module._say_that_nobody_looks.cache_clear()
    with caplog.at_level("INFO"):
        for _ in range(2):
            report_near_duplicates("validation data", {"web": given([row(TEXT + "!")])}, {"t": given([row(TEXT)])})
    (record,) = caplog.records
    assert record.levelname == "INFO"
    assert "near-duplicates are not: pip install 'bilevel[near-duplicates]'" in record.message


def test_a_run_and_a_fine_tuning_warn_of_them_and_go_on(problem, tuning, data, tmp_path, caplog):
    """Not so of equal rows, which have a warning of their own."""
    text = TEXT[:40]
    near = write_jsonl(tmp_path / "near.jsonl", [{"instruction": "say", "output": f"{text} {i}"} for i in range(12)])
    target = write_jsonl(tmp_path / "target.jsonl", [{"instruction": "say", "output": f"{text} x{i}"} for i in range(12)])
    problem(
        sources=[Source("clean", data["clean"]), Source("leaking", str(near))], validation=[ValidationSet(str(target))]
    ).prepare()
    (words,) = (record.getMessage() for record in caplog.records if "near-duplicates" in record.message)
    assert words.startswith(
        "near-duplicates of rows of the validation data, which are not left out: 12 in source 'leaking' ("
    )
    assert f"{near}:1 ≈ {target}:1" in words
    caplog.clear()
    tuning(data=str(near), validation=[ValidationSet(data["target"])], held_out=[DataFiles(str(target))]).prepare()
    (words,) = (record.getMessage() for record in caplog.records if "near-duplicates" in record.message)
    assert words.startswith(
        "near-duplicates of rows of the validation or held-out data, which are not left out: 12 in the train"
    )
