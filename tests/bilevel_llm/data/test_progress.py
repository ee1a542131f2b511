"""How far tokenizing has come: within a file, and as lines of the log where there is no terminal."""

import logging

import pytest

from bilevel_llm.data import progress as module
from bilevel_llm.data.files import read_objects, size_of
from bilevel_llm.data.progress import reading
from tests.bilevel_llm.tiny import alpaca, write_jsonl


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.arrow"])
def test_all_bytes_of_a_file_are_told_of_while_it_is_read(tmp_path, name):
    from datasets import Dataset

    file = tmp_path / name
    rows = alpaca("a", 600)
    if name == "a.jsonl":
        write_jsonl(file, rows)
    elif name == "a.parquet":
        Dataset.from_list(rows).to_parquet(file)
    else:
        from pyarrow import Table, ipc

        with ipc.new_file(str(file), Table.from_pylist(rows).schema) as out:
            out.write_table(Table.from_pylist(rows))
    told = []
    assert len(list(read_objects(file, watch=told.append))) == 600
    assert len([size for size in told if size]) > 1 or name == "a.arrow"
    assert 0.6 * size_of(file) < sum(told) <= 1.1 * size_of(file)


def test_without_a_terminal_the_log_says_how_far_it_is(tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.setattr(module, "_EVERY", 0.0)
    file = write_jsonl(tmp_path / "a.jsonl", alpaca("a", 5))
    with caplog.at_level(logging.INFO), reading([file]) as shown:
        shown.read(file.stat().st_size // 2)
        shown.advance(3)
    assert "tokenizing: 50% of the files read, 3 rows tokenized" in caplog.messages
    assert capsys.readouterr().err == "", "no control codes get into a pipe"
