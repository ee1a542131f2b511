"""A sample of rows: random, the same everywhere, in one pass and in bounded memory."""

import json
import tracemalloc
from collections import Counter

import pytest
from scipy.stats import chisquare

from bilevel_llm.data.sample import sampled
from bilevel_llm.data.settings import DataFiles
from bilevel_llm.data.tokens import report_table, tokenize
from tests.bilevel_llm.tiny import alpaca, make_tokenizer, write_jsonl


def test_every_row_is_equally_likely_wherever_it_stands():
    drawn = Counter(place for seed in range(2000) for place, _ in sampled(range(20), 5, seed)[0])
    assert chisquare([drawn[place] for place in range(20)]).pvalue > 1e-3
    pairs = Counter(tuple(place for place, _ in sampled(range(5), 2, seed)[0]) for seed in range(2000))
    assert len(pairs) == 10
    assert chisquare(list(pairs.values())).pvalue > 1e-3


def test_a_sample_is_in_order_knows_of_how_many_it_is_and_holds_the_smaller_ones():
    rows = [f"row {i}" for i in range(1000)]
    small, total = sampled(iter(rows), 10, 0)
    large, _ = sampled(iter(rows), 40, 0)
    assert total == 1000
    assert small == sorted(small)
    assert all(rows[place] == row for place, row in large)
    assert set(small) < set(large)
    assert sampled(iter(rows), 10, 1)[0] != small
    assert sampled(iter(rows), 2000, 0) == (list(enumerate(rows)), 1000)


def test_no_more_rows_than_are_asked_for_are_held():
    tracemalloc.start()
    sampled((bytes(1000) + number.to_bytes(4, "big") for number in range(20_000)), 50, 0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200_000


@pytest.fixture
def two_files(tmp_path):
    for name in ("one", "two"):
        write_jsonl(tmp_path / f"{name}.jsonl", alpaca(name, 60))
    return [str(tmp_path / "one.jsonl"), str(tmp_path / "two.jsonl")]


def test_a_table_of_a_sample_is_a_part_of_the_whole_table_and_says_so(two_files, tmp_path, caplog):
    whole = tokenize(DataFiles(two_files), make_tokenizer(), max_length=60)
    data = DataFiles(two_files, max_rows=30)
    part, again = (tokenize(data, make_tokenizer(), max_length=60, cache=tmp_path / "cache") for _ in range(2))
    places = [whole.where(i) for i in range(len(whole))]
    assert len(part) == 30
    for i in range(30):
        assert part.row(i)[0].tolist() == whole.row(places.index(part.where(i)))[0].tolist()
    assert {0, 1} == set(part.file.tolist())
    assert again.training_hash == part.training_hash
    assert (again.sampled_from, again.stands_for) == (120, 4.0)
    assert (whole.sampled_from, whole.stands_for) == (None, 1.0)
    with caplog.at_level("INFO"):
        report_table("source 'web'", part, 60)
    assert "source 'web': 30 of 120 rows, sampled" in caplog.text


def test_a_sample_of_more_rows_than_there_are_is_all_of_them(two_files):
    whole = tokenize(DataFiles(two_files), make_tokenizer(), max_length=60)
    table = tokenize(DataFiles(two_files, max_rows=500), make_tokenizer(), max_length=60)
    assert table.training_hash == whole.training_hash
    assert table.sampled_from is None


def test_a_bad_row_counts_if_it_is_in_the_sample_and_only_then(tmp_path):
    rows = [{"instruction": "q", "output": None if i % 2 else "a"} for i in range(40)]
    file = str(tmp_path / "a.jsonl")
    write_jsonl(tmp_path / "a.jsonl", rows)
    table = tokenize(DataFiles(file, max_rows=10), make_tokenizer(), max_length=60, on_bad_row="skip")
    drawn = [place for place, _ in sampled(range(40), 10, 0)[0]]
    assert table.number.tolist() == [place + 1 for place in drawn if place % 2 == 0]
    assert table.bad == sum(place % 2 for place in drawn) == len(table.reasons)
    assert table.stands_for == 4.0
    assert json.dumps(table.reasons)
