"""What `fields` in a recipe says is read, everywhere, and what it cannot mean is refused with what there is."""

import json

import pytest

from bilevel import InputError
from bilevel_llm.data.columns import columns_of
from bilevel_llm.data.reading import each_row, read_raw_rows
from bilevel_llm.data.settings import DataFiles, Source

ROW = {
    "question": "q",
    "answer": "a",
    "rejected": "worse",
    "input": "not to be read",
    "talk": [{"from": "human", "value": "q"}],
}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("fields", "format", "turns"),
    [
        ({"prompt": "question", "response": "answer"}, None, [("user", "q"), ("assistant", "a")]),
        ({"instruction": "question", "output": "answer"}, None, [("user", "q"), ("assistant", "a")]),
        ({"prompt": "question", "response": "answer"}, "prompt_completion", [("prompt", "q"), ("completion", "a")]),
        ({"prompt": "question", "completion": "answer"}, None, [("prompt", "q"), ("completion", "a")]),
        ({"prompt": "question", "response": "answer", "input": "rejected"}, None, [("user", "q\n\nworse"), ("assistant", "a")]),
        ({"prompt": "question", "response": "answer", "system": "rejected"}, None, [("system", "worse"), ("user", "q"), ("assistant", "a")]),
        ({"text": "answer"}, None, [("text", "a")]),
        ({"messages": "talk"}, None, [("user", "q"), ("assistant", "a")]),
    ],
)  # fmt: skip
def test_only_the_columns_that_are_named_are_read_in_the_format_that_has_such_roles(tmp_path, fields, format, turns):
    row = {**ROW, "talk": [*ROW["talk"], {"from": "gpt", "value": "a"}]}
    (read,) = each_row(write(tmp_path / "a.jsonl", row), format, fields=fields)
    assert [(turn.role, turn.text) for turn in read.turns] == turns


@pytest.mark.parametrize(
    ("fields", "format", "message"),
    [
        ({"promt": "question", "response": "answer"}, None, r"'promt' is no role; did you mean 'prompt'\?"),
        ({"text": "question"}, "alpaca", "'text' is no role of format 'alpaca'"),
        ({"prompt": "question"}, "alpaca", "'prompt' does not make a row; name prompt and response"),
        ({"prompt": "question", "messages": "answer"}, None, "'prompt' and 'messages' does not make a row"),
        ({}, None, "nothing does not make a row"),
        ({"prompt": "q", "instruction": "q", "response": "a"}, None, "'prompt' and 'instruction' are the same field"),
    ],
)
def test_roles_that_make_no_row_are_refused_before_a_file_is_read(fields, format, message):
    with pytest.raises(InputError, match=message):
        columns_of(fields, format)
    with pytest.raises(ValueError, match=f"fields: .*{message}"):
        Source("web", "no-such-file", format, fields=fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "xyz", "response": "answer"}, r"field 'xyz', which fields\.prompt names: there are question, answer$"),
        (
            {"prompt": "qestion", "response": "answer"},
            r"a\.jsonl:1: the row has no field 'qestion', which fields\.prompt names: there are question, answer; did you mean 'question'\?",
        ),
        (
            {"prompt": "question", "response": "answer", "system": "sistem"},
            r"a\.jsonl: no row has a field 'sistem', which fields\.system names: there are question, answer, system; did you mean 'system'\?",
        ),
    ],
)
def test_a_wrong_column_is_named_with_those_that_there_are(tmp_path, fields, message):
    file = write(tmp_path / "a.jsonl", {"question": "q", "answer": "a"}, {"question": "q", "answer": "a", "system": "s"})
    with pytest.raises(InputError, match=message):
        list(each_row(file, fields=fields))


def test_an_optional_column_may_be_absent_from_some_rows(tmp_path):
    file = write(tmp_path / "a.jsonl", {"q": "q", "a": "a"}, {"q": "q", "a": "a", "s": "x"})
    rows = each_row(file, fields={"prompt": "q", "response": "a", "system": "s"})
    assert [len(row.turns) for row in rows] == [2, 3]


def test_a_layout_that_trainers_are_told_has_the_names_of_the_file(tmp_path):
    for fields, columns in (
        ({"prompt": "question", "response": "answer"}, ("question", "answer")),
        ({"text": "answer"}, ("answer",)),
        ({"messages": "talk"}, ("talk",)),
        ({"prompt": "question", "completion": "answer"}, ("question", "answer")),
    ):
        data = DataFiles(str(write(tmp_path / "a.jsonl", ROW)), fields=fields)
        (row,) = read_raw_rows(*data.files(), fields=fields)
        names = columns_of(fields, None)
        assert names is not None
        assert row.layout.renamed(names.names).columns == columns
        assert set(row.fields) <= set(names.names)
