import gzip
import json
import tracemalloc
from pathlib import Path

import pytest

from bilevel.errors import InputError
from bilevel_llm.data import files, json_text
from bilevel_llm.data.reading import each_row, read_rows
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
    with pytest.raises(
        InputError, match=r"two: there are the splits train, test; say which, as in split: train or .*two/train"
    ):
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
    ("a.xls", "x", ["a.xls: unknown type of file '.xls'", ".jsonl"]),
    ("a.jsonl", " \n", ["a.jsonl: the file is empty"]),
    ("a.json", "[ ]", ["a.json: the file holds no rows"]),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', ["a.jsonl:2: byte 0xff is not UTF-8"]),
    ("a.jsonl", '{"text": "a"}\n{"text": "b" "c"}', ["a.jsonl:2: malformed JSON at column 14"]),
    ("a.json", '[\n{"text": "a"},\n{"text": }\n]', ["a.json:3: malformed JSON at column 10"]),
    ("a.json", '[\n{"text": "a"}\n{"text": "b"}]', ["a.json:3: malformed JSON at column 1", "','"]),
    ("a.json", '[{"text": "a"}', ["a.json:1: malformed JSON at column 15"]),
    ("a.json", '[{"text": "a"},]', ["a.json:1: malformed JSON at column 16"]),
    ("a.json", '[{"text": "a"}]\nx', ["a.json:2: malformed JSON at column 1: Extra data"]),
    ("a.json", '"text"', ["a.json: the file holds a string, not an array", ".jsonl"]),
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
    (
        {"messages": [USER, {"role": "assistant", "content": [1]}]},
        None,
        ["field 'messages[1].content[0]' is a number, but must be a string or a part"],
    ),
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


# ----------------------------------------------------------------------------------------------------- kinds of files

ROWS = [{"text": "a\nb"}, {"text": 'é, "quoted"'}, {"text": "c"}]


def make_file(path: Path) -> str:
    import pyarrow

    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    table = pyarrow.Table.from_pylist(ROWS)
    name = path.name
    if name.endswith(".parquet"):
        from pyarrow import parquet

        parquet.write_table(table, path)
    elif name.endswith(".arrow"):
        new = pyarrow.ipc.new_file if name.startswith("file") else pyarrow.ipc.new_stream
        with new(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    else:
        name = name.lower()
        if ".csv" in name:
            lines = "text,id\r\n" + "".join('"' + row["text"].replace('"', '""') + '",1\r\n' for row in ROWS)
        data = lines.encode()
        if name.endswith(".gz"):
            data = gzip.compress(data)
        if name.endswith(".zst"):
            data = pyarrow.compress(data, "zstd", asbytes=True)
        path.write_bytes(data)
    return str(path)


@pytest.mark.parametrize(
    "name",
    [
        "a.jsonl", "a.ndjson", "a.json", "a.csv", "a.jsonl.gz", "a.json.gz", "a.JSONL.ZST", "a.json.zst", "a.csv.zst",
        "file.arrow", "stream.arrow", "a.parquet",
    ],
)  # fmt: skip
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    rows = read_rows([make_file(tmp_path / name)])
    assert [row.turns[0].text for row in rows] == [row["text"] for row in ROWS]
    numbers = [int(row.where.rpartition(":")[2]) for row in rows]
    assert numbers == ([2, 4, 5] if ".csv" in name else [1, 2, 3])


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.zst", "a.csv.gz", "stream.arrow", "file.arrow", "a.parquet"])
@pytest.mark.parametrize("part", [0.5, 0.9])
def test_a_file_that_was_cut_off_is_an_error_that_says_so(tmp_path, name, part):
    whole = Path(make_file(tmp_path / name)).read_bytes()
    assert f"{name}: not a " in refused(whole[: int(part * len(whole))], tmp_path, name)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('a,b\n"x,1\n', "a.csv:2: malformed CSV"),
        ("text,text\nx,y\n", "a.csv:1: the first line must name every column, each differently"),
        ("text,\nx,y\n", "a.csv:1: the first line must name every column"),
        ('text,b\n"x\ny",1\nz\n', "a.csv:4: the row has 1 cells, and the first line names 2 columns"),
        ("question,b\n1,2\n", "a.csv:2: the row is in no known format: it has question, b"),
        ("", "a.csv: the file is empty"),
        ("text\n", "a.csv: the file holds no rows"),
    ],
)
def test_a_csv_file_that_cannot_be_read_says_where_and_why(tmp_path, content, says):
    assert says in refused(content, tmp_path, "a.csv")


# ---------------------------------------------------------------------------------------------------------- large files


def test_rows_are_read_one_by_one(tmp_path, monkeypatch):
    """No more than a few chunks of a file are ever read ahead of the row that is asked for."""
    for name, glue in (("a.jsonl", "\n"), ("a.json", ",\n")):
        body = glue.join(json.dumps({"text": "x" * 100}) for _ in range(9000))
        (tmp_path / name).write_text(f"[{body}]" if name == "a.json" else body)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
        for file in (tmp_path / name, tmp_path / f"{name}.gz"):
            tracemalloc.start()
            count = sum(1 for _ in each_row(file))
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert count == 9000
            assert peak < 500_000, (file.name, peak)  # the file has 1,000,000 bytes, and its rows more


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json"])
def test_a_row_that_does_not_end_is_refused_before_it_is_held(tmp_path, monkeypatch, name):
    for module in (files, json_text):
        monkeypatch.setattr(module, "MAX_ROW", 1 << 20)
    long = "x" * (3 << 20)
    content = {
        "a.jsonl": f'{{"text": "a"}}\n{{"text": "{long}"}}\n{{"text": "b"}}\n',
        "a.json": f'[{{"text": "a"}},\n{{"text": "{long}"}}]',
        "a.csv": f"text\na\n{long}\n",
    }[name]
    number = 3 if name == "a.csv" else 2
    assert f"{name}:{number}: the {'row' if name == 'a.json' else 'line'} is longer than 1 MiB" in refused(
        content, tmp_path, name
    )
    if name == "a.jsonl":
        left: list[InputError] = []
        assert [row.turns[0].text for row in each_row(tmp_path / name, on_bad=left.append)] == ["a", "b"]
        assert len(left) == 1


HOSTILE = {
    "deep list": "[" * 10_000 + "]" * 10_000,
    "deep objects": '{"a":' * 10_000 + "1" + "}" * 10_000,
    "huge number": "9" * 5_000,
    "huge float": "1e999999",
    "brackets in strings": "[" * 5_000 + '"]\\"]"' + "]" * 5_000,
}


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_value_that_python_cannot_hold_does_no_harm_in_a_field_that_is_not_read(tmp_path, name, value):
    def file(field: str) -> str:
        row = f'{{"meta": {value}, "text": {value if field == "text" else json.dumps("a")}, "id": 1}}'
        return f'[{row},\n{{"text": "b"}}]' if name == "a.json" else f'{row}\n{{"text": "b"}}'

    (tmp_path / name).write_text(file("meta"))
    assert [row.turns[0].text for row in read_rows([str(tmp_path / name)])] == ["a", "b"]
    message = refused(file("text"), tmp_path, name)
    assert f"{name}:1: field 'text' is a" in message
    assert len(message) < 300


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_of_several_values_under_one_name_none_is_taken(tmp_path, name):
    def file(row: str) -> str:
        return f"[{row}]" if name == "a.json" else row

    (tmp_path / name).write_text(file('{"text": "a", "text": "a", "meta": 1, "meta": {"k": 1, "k": 2}}'))
    assert [row.turns[0].text for row in read_rows([str(tmp_path / name)])] == ["a"]
    assert f"{name}:1: field 'text' is several values" in refused(file('{"text": "a", "text": "b"}'), tmp_path, name)
    assert f"{name}:1: " in refused(
        file('{"messages": [{"role": "user", "role": "assistant", "content": "a"}]}'), tmp_path, name
    )


@pytest.mark.parametrize("content", ["[" * 10_000, '{"a":' * 10_000, "[" * 10_000 + "]" * 10_000, '{"a": [' + "[" * 4_999])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_deep_nesting_that_is_no_row_is_refused(tmp_path, name, content):
    assert f"{name}:1: " in refused(content, tmp_path, name)


def test_bad_rows_are_passed_over_if_the_caller_says_so(tmp_path):
    lines = [b'{"text": "a"}', b"{", b'{"text": 1}', b"\xff", b"[1]", b'{"text": "b"}', b'{"prompt": "a"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    left: list[InputError] = []
    rows = list(each_row(tmp_path / "a.jsonl", on_bad=left.append))
    assert [row.where.rpartition(":")[2] for row in rows] == ["1", "6"]
    assert [str(error).partition(": ")[0].rpartition(":")[2] for error in left] == ["2", "3", "4", "5", "7"]


def test_tab_separated_files_are_read_and_other_separators_are_named(tmp_path):
    (tmp_path / "a.tsv").write_text('text\tid\n"a, b"\t1\n')
    assert [row.turns[0].text for row in read_rows([str(tmp_path / "a.tsv")])] == ["a, b"]
    for name, head, message in (
        ("semicolons.csv", "text;id", "seem to be separated by ';', and not by commas; write it again with commas"),
        ("tabs.csv", "text\tid", r"separated by tabs, and not by commas; name the file \.tsv"),
        ("pipes.csv", "text|id", r"separated by '\|', and not by commas"),
        ("commas.tsv", "text,id", "separated by ',', and not by tabs; write it again with tabs"),
    ):
        (tmp_path / name).write_text(f'{head}\n"a";1\n')
        with pytest.raises(InputError, match=rf"{name}:1: the first line names one column, .*{message}"):
            read_rows([str(tmp_path / name)])
