import gzip
import json
from pathlib import Path

import pytest

from bilevel.errors import InputError
from bilevel_llm.data.reading import read_rows
from bilevel_llm.data.rows import Row, Turn, fingerprint

ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}
TWO_TURNS = (Turn("user", "Hi"), Turn("assistant", "Hello"))


def write(path: Path, *records: object) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def turns_of(path: Path, record: object, format: str | None = None) -> tuple[Turn, ...]:
    (row,) = read_rows([write(path / "a.jsonl", record)], format=format)
    return row.turns


def refused(content: str | bytes, path: Path, name: str = "a.jsonl", format: str | None = None) -> str:
    (path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError) as caught:
        read_rows([str(path / name)], format=format)
    return str(caught.value).replace(str(path) + "/", "")


# ------------------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize(
    ("extra", "user"),
    [({"input": "1 2"}, "Add.\n\n1 2"), ({"input": ""}, "Add."), ({"input": None}, "Add."), ({}, "Add.")],
)
def test_alpaca_puts_the_input_under_the_instruction(tmp_path, extra, user):
    record = {"instruction": "Add.", "output": "3", **extra}
    assert turns_of(tmp_path, record) == (Turn("user", user), Turn("assistant", "3"))


@pytest.mark.parametrize("field", ["conversations", "items"])
def test_sharegpt_names_are_mapped_to_roles(tmp_path, field):
    record = {
        "id": 7,
        field: [
            {"from": "system", "value": "Be kind."},
            {"from": "human", "value": "Hi"},
            {"from": "gpt", "value": "Hello"},
            {"from": "user", "value": "Bye"},
            {"from": "assistant", "value": "So long"},
        ],
    }
    assert turns_of(tmp_path, record) == (
        Turn("system", "Be kind."),
        Turn("user", "Hi"),
        Turn("assistant", "Hello"),
        Turn("user", "Bye"),
        Turn("assistant", "So long"),
    )


def test_messages_are_read_as_they_are(tmp_path):
    record = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    assert turns_of(tmp_path, record) == TWO_TURNS


def test_conversations_may_be_spelled_with_role_and_content(tmp_path):
    record = {"conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    assert turns_of(tmp_path, record) == TWO_TURNS


def test_prompt_and_completion_stay_raw(tmp_path):
    record = {"prompt": "2 + 2 = ", "completion": "4"}
    assert turns_of(tmp_path, record) == (Turn("prompt", "2 + 2 = "), Turn("completion", "4"))


def test_prompt_and_completion_as_messages_are_a_conversation(tmp_path):
    record = {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Hello"}]}
    assert turns_of(tmp_path, record) == TWO_TURNS


def test_text_is_one_turn(tmp_path):
    assert turns_of(tmp_path, {"text": "Once upon"}) == (Turn("text", "Once upon"),)


def test_a_rendered_text_beside_the_fields_of_alpaca_is_ignored(tmp_path):
    record = {**ALPACA, "text": "### Instruction ..."}
    assert turns_of(tmp_path, record)[1] == Turn("assistant", "3")
    assert turns_of(tmp_path, record, "text") == (Turn("text", "### Instruction ..."),)


# --------------------------------------------------------------------------------------------------------------- files


def test_json_rows_are_named_by_the_line_they_start_on(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([ALPACA, ALPACA], indent=1))
    assert [row.where for row in read_rows([str(path)])] == [f"{path}:2", f"{path}:7"]


def test_json_rows_that_share_a_line_are_numbered(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([ALPACA, ALPACA]))
    assert [row.where for row in read_rows([str(path)])] == [f"{path}:1", f"{path}:2"]


def test_jsonl_tolerates_byte_order_mark_blank_lines_crlf_and_line_separators_in_strings(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n' + '{"text": "b\u2028c"}'.encode())
    assert read_rows([str(path)]) == [
        Row((Turn("text", "a"),), f"{path}:1"),
        Row((Turn("text", "b\u2028c"),), f"{path}:3"),
    ]


@pytest.mark.parametrize(("name", "content"), [("a.json.gz", [{"text": "a"}]), ("a.jsonl.gz", {"text": "a"})])
def test_gzip_files_are_read(tmp_path, name, content):
    (tmp_path / name).write_bytes(gzip.compress(json.dumps(content).encode()))
    assert read_rows([str(tmp_path / name)]) == [Row((Turn("text", "a"),), f"{tmp_path / name}:1")]


def test_parquet_rows_are_numbered(tmp_path):
    import pyarrow
    from pyarrow import parquet

    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": messages}] * 2), path)
    assert read_rows([str(path)]) == [Row(TWO_TURNS, f"{path}:1"), Row(TWO_TURNS, f"{path}:2")]


def test_saved_data_sets_are_read(tmp_path):
    from datasets import Dataset, DatasetDict

    data = Dataset.from_list([ALPACA])
    data.save_to_disk(str(tmp_path / "plain"))
    DatasetDict({"train": data}).save_to_disk(str(tmp_path / "one"))
    DatasetDict({"train": data, "test": data}).save_to_disk(str(tmp_path / "two"))
    rows = read_rows([str(tmp_path / "plain"), str(tmp_path / "one"), str(tmp_path / "two" / "test")])
    assert [row.turns for row in rows] == [(Turn("user", "Add.\n\n1 2"), Turn("assistant", "3"))] * 3
    assert rows[0].where == f"{tmp_path / 'plain'}:1"
    with pytest.raises(InputError, match=r"two: holds the splits train, test; name one, as in .*two/train"):
        read_rows([str(tmp_path / "two")])


def test_globs_are_sorted_and_reach_any_depth_and_files_count_once(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("b.jsonl", "a.jsonl", "deep/er/c.jsonl"):
        write(tmp_path / name, {"text": name})
    rows = read_rows(["~/b.jsonl", "~/**/*.jsonl", "~/deep/../a.jsonl"])
    assert [row.turns[0].text for row in rows] == ["b.jsonl", "a.jsonl", "deep/er/c.jsonl"]


def test_a_path_may_contain_brackets(tmp_path):
    assert len(read_rows([write(tmp_path / "a[1].jsonl", {"text": "a"})])) == 1


# -------------------------------------------------------------------------------------------------------------- errors


def test_missing_files_are_named_with_the_nearest_there_is(tmp_path):
    write(tmp_path / "train.jsonl", {"text": "a"})
    with pytest.raises(InputError, match=r"no such file: .*/trian\.jsonl .*did you mean 'train\.jsonl'"):
        read_rows([str(tmp_path / "trian.jsonl")])


def test_a_glob_without_a_match_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"no file matches .*\*\.jsonl"):
        read_rows([str(tmp_path / "*.jsonl")])


def test_no_files_at_all_is_an_error():
    with pytest.raises(InputError, match="no data files are named"):
        read_rows([])


def test_a_directory_of_files_is_not_a_saved_data_set(tmp_path):
    with pytest.raises(InputError, match=r"a directory, but not one written by .*save_to_disk; name its files"):
        read_rows([str(tmp_path)])


FILE_ERRORS = [
    ("a.csv", "x", ["a.csv: unknown type of file '.csv'", ".jsonl"]),
    ("a.jsonl", " \n", ["a.jsonl: the file is empty"]),
    ("a.json", "[ ]", ["a.json: the file holds no rows"]),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', ["a.jsonl:2: byte 0xff is not UTF-8"]),
    ("a.jsonl", '{"text": "a"}\n{"text": "b" "c"}', ["a.jsonl:2: malformed JSON at column 14"]),
    ("a.json", '[\n{"text": "a"},\n{"text": }\n]', ["a.json:3: malformed JSON at column 10"]),
    ("a.json", '[\n{"text": "a"}\n{"text": "b"}]', ["a.json:3: malformed JSON at column 1", "','"]),
    ("a.json", '[{"text": "a"}', ["a.json:1: malformed JSON at column 15"]),
    ("a.json", '[{"text": "a"},]', ["a.json:1: malformed JSON at column 16"]),
    ("a.json", '[{"text": "a"}]\nx', ["a.json:2: malformed JSON at column 1: Extra data"]),
    ("a.json", '{"text": "a"}\n{"text": "b"}', ["a.json: the file holds an object, not an array", ".jsonl"]),
    ("a.jsonl.gz", b"no gzip", ["a.jsonl.gz: not a whole gzip file"]),
    ("a.json.gz", gzip.compress(b'[{"text": "a"}]', mtime=0)[:-9], ["a.json.gz: not a whole gzip file"]),
    ("a.parquet", b"PAR0", ["a.parquet: not a readable parquet file"]),
]


@pytest.mark.parametrize(("name", "content", "says"), FILE_ERRORS)
def test_files_that_cannot_be_read_say_where_and_why(tmp_path, name, content, says):
    message = refused(content, tmp_path, name)
    assert all(words in message for words in says), message


USER = {"role": "user", "content": "Hi"}
ROW_ERRORS = [
    ([1], None, ["a.jsonl:1: the row is a list", "object"]),
    ({"question": "a", "reply": "b"}, None, ["a.jsonl:1: the row is in no known format: it has question, reply"]),
    (
        {"instruction": "a", "outputs": "b"},
        None,
        ["it has instruction, outputs; the nearest format is 'alpaca'", "instruction and output"],
    ),
    (ALPACA, "messages", ["a.jsonl:1: the row has no 'messages', which format 'messages' needs", "format: alpaca"]),
    ({"prompt": "a"}, "prompt_completion", ["has no 'completion'", "it has prompt"]),
    (ALPACA, "sharegtp", ["unknown format 'sharegtp'; did you mean 'sharegpt'?"]),
    ({**ALPACA, "output": 3}, None, ["a.jsonl:1: field 'output' is a number, but must be a string"]),
    ({**ALPACA, "output": None}, None, ["field 'output' is null"]),
    ({**ALPACA, "input": ["x"]}, None, ["field 'input' is a list"]),
    ({"text": "\ud83d"}, None, ["field 'text' contains \\ud83d, half of a surrogate pair"]),
    ({"messages": "Hi"}, None, ["field 'messages' is a string, but must be a list of turns"]),
    ({"messages": ["Hi"]}, None, ["messages[0] is a string, but must be an object"]),
    ({"messages": [{"role": "user"}]}, None, ["messages[0] must have 'role' and 'content'", "it has role"]),
    ({"messages": [USER, {"role": "assistant", "content": [1]}]}, None, ["field 'messages[1].content' is a list"]),
    ({"items": [{"from": "humam", "value": "a"}]}, None, ["unknown role 'humam' in items[0].from", "mean 'human'"]),
    ({"messages": [USER]}, None, ["a.jsonl:1: no assistant turn to learn from (turns: user)"]),
    ({"messages": []}, None, ["no assistant turn to learn from (turns: none at all)"]),
    ({"prompt": [USER], "completion": [USER]}, None, ["no assistant turn to learn from (turns: user, user)"]),
    ({"prompt": [USER], "completion": "Hello"}, None, ["field 'completion' is a string, but must be a list"]),
]


@pytest.mark.parametrize(("record", "format", "says"), ROW_ERRORS)
def test_rows_that_cannot_be_used_say_where_and_why(tmp_path, record, format, says):
    message = refused(json.dumps(record), tmp_path, format=format)
    assert all(words in message for words in says), message


def test_the_format_of_the_first_row_holds_for_the_file(tmp_path):
    message = refused("\n".join(map(json.dumps, [ALPACA, {"text": "a"}])), tmp_path)
    assert "a.jsonl:2: the row has no 'instruction' and 'output', which format 'alpaca' needs: it has text" in message


def test_a_bad_row_of_an_array_is_named_by_its_line(tmp_path):
    message = refused('[\n{"text": "a"},\n{"text": 1}\n]', tmp_path, "a.json")
    assert message.startswith("a.json:3: field 'text' is a number")


# -------------------------------------------------------------------------------------------------------- fingerprints


def test_fingerprints_ignore_case_spacing_unicode_form_and_roles():
    row = Row((Turn("user", "The  Ⅻ\nStraße "), Turn("assistant", "Ok")), "a:1")
    same = Row((Turn("prompt", "the xii STRASSE"), Turn("completion", " ok")), "b:2")
    assert fingerprint(row) == fingerprint(same)


@pytest.mark.parametrize("texts", [("ab", "d"), ("a", "bc"), ("abc",), ("a b", "c")])
def test_fingerprints_tell_apart_other_words_and_other_turns(texts):
    assert fingerprint(Row(tuple(Turn("user", t) for t in texts), "")) != fingerprint(
        Row((Turn("user", "ab"), Turn("assistant", "c")), "")
    )
