import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bilevel_llm.data.overlap import find_overlap
from bilevel_llm.data.settings import DataFiles
from bilevel_llm.data.tokens import TokenTable, tokenize


@pytest.fixture
def table(tmp_path):
    """table(name, record, ...): a table of the rows, in a file of that name."""
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")

    def make(name: str, *records: dict[str, object]) -> TokenTable:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return tokenize(DataFiles(str(path)), tokenizer, max_length=99, cache=tmp_path / "cache")

    return make


def pair(question: str, answer: str) -> dict[str, object]:
    return {"instruction": question, "output": answer}


def chat(question: str, answer: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_equal_rows_are_counted_by_source_and_set_and_named(table, tmp_path):
    overlap = find_overlap(
        {"one": table("one", pair("a", "b"), pair("c", "d"), pair("c", "d")), "two": table("two", pair("e", "f"))},
        {"near": table("near", pair("x", "y"), pair("c", "d")), "far": table("far", pair("u", "v"))},
    )
    assert overlap
    assert overlap.train == {"one": 2, "two": 0}
    assert overlap.validation == {"near": 1, "far": 0}
    there = f"{tmp_path}/near.jsonl:2"
    assert overlap.examples == {"one": ((f"{tmp_path}/one.jsonl:2", there), (f"{tmp_path}/one.jsonl:3", there))}
    assert str(overlap) == (
        f"rows of the validation data also occur in the training data: "
        f"2 in 'one' ({tmp_path}/one.jsonl:2 = {there}, {tmp_path}/one.jsonl:3 = {there})"
    )


def test_case_spacing_unicode_form_and_file_format_do_not_hide_a_row(table):
    overlap = find_overlap(
        {"one": table("one", chat("What  is\nthe Ⅻ?", "STRASSE "))},
        {"set": table("set", pair("what is the xii?", "Straße"))},
    )
    assert overlap.train == {"one": 1}


def test_rows_that_share_a_question_alone_do_not_overlap(table):
    overlap = find_overlap({"one": table("one", pair("a", "b"))}, {"set": table("set", pair("a", "c"), pair("b", "a"))})
    assert not overlap
    assert overlap.train == {"one": 0}
    assert overlap.validation == {"set": 0}
    assert str(overlap) == "training and validation data have no row in common"


def test_at_most_three_examples_of_a_source_are_given(table):
    rows = [pair("q", str(number)) for number in range(5)]
    overlap = find_overlap({"one": table("one", *rows)}, {"set": table("set", *reversed(rows))})
    assert overlap.train == {"one": 5}
    assert [(a[-2:], b[-2:]) for a, b in overlap.examples["one"]] == [(":1", ":5"), (":2", ":4"), (":3", ":3")]


def test_nothing_overlaps_with_no_validation_sets(table):
    assert not find_overlap({"one": table("one", pair("a", "b"))}, {})
