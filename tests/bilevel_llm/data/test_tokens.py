import json
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import ThreadPool as Pool
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bilevel.errors import InputError
from bilevel.files import hidden
from bilevel.lock import owned
from bilevel_llm.data import tokens as module
from bilevel_llm.data.chat import NO_END
from bilevel_llm.data.formats.alpaca import Alpaca
from bilevel_llm.data.settings import DataFiles
from bilevel_llm.data.tokens import TokenTable, content_hash, default_cache, report_table, tokenize

TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def word_tokenizer(*more_words: str, eos: str | None = "</s>", template: str = TEMPLATE, **special: str):
    words = ["<unk>", "</s>", "user", "assistant", "a", "b", "c", "d", *more_words]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<unk>",
        eos_token=eos,
        chat_template=template,
        **special,
    )


def data(path: Path, *pairs: tuple[str, str]) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"instruction": q, "output": a}) + "\n" for q, a in pairs))
    return str(path)


def words_of(table: TokenTable, index: int) -> list[str]:
    """The words of a row, targets in capitals."""
    ids, labels = table.row(index)
    words = word_tokenizer().convert_ids_to_tokens(ids.tolist())
    return [word.upper() if label else word for word, label in zip(words, labels, strict=True)]


def equal(one: TokenTable, other: TokenTable) -> bool:
    def contents(table: TokenTable) -> list[object]:
        arrays = (table.ids, table.labels, table.starts, table.fingerprints, table.file, table.number)
        counts = [table.rows_read, table.truncated, table.dropped, table.notes, table.content_hash]
        return [(array.dtype, array.tolist()) for array in arrays] + counts

    return contents(one) == contents(other)


@pytest.fixture
def no_reading(monkeypatch):
    """Fails a test that tokenizes data anew."""

    def forbid():
        monkeypatch.setattr(module, "each_row", lambda *_: pytest.fail("the data was read again"))

    return forbid


# --------------------------------------------------------------------------------------------------------------- table


def test_rows_of_all_files_are_laid_out_flat(tmp_path):
    files = [data(tmp_path / "1.jsonl", ("a", "b c"), ("b", "d")), data(tmp_path / "2.jsonl", ("c", "a"))]
    table = tokenize(DataFiles(files), word_tokenizer(), max_length=99)
    assert len(table) == table.rows_read == 3
    assert words_of(table, 0) == ["user", "a", "</s>", "assistant", "B", "C", "</S>"]
    assert words_of(table, 2) == ["user", "c", "</s>", "assistant", "A", "</S>"]
    assert table.starts.tolist() == [0, 7, 13, 19]
    assert table.lengths.tolist() == [7, 6, 6]
    assert table.supervised.tolist() == [3, 2, 2]
    assert [table.where(row) for row in range(3)] == [f"{files[0]}:1", f"{files[0]}:2", f"{files[1]}:1"]
    assert (table.ids.dtype, table.starts.dtype, table.labels.dtype) == (np.int32, np.int64, np.bool_)
    assert (table.truncated, table.dropped, table.notes) == (0, 0, {})


def test_long_rows_keep_their_beginning_and_rows_without_a_target_are_left_out(tmp_path):
    table = tokenize(
        DataFiles([data(tmp_path / "1.jsonl", ("a b c", "a"), ("a", "b"), ("a", "b c d"))]), word_tokenizer(), max_length=6
    )
    assert [words_of(table, row) for row in range(len(table))] == [
        ["user", "a", "</s>", "assistant", "B", "</S>"],
        ["user", "a", "</s>", "assistant", "B", "C"],
    ]
    assert (table.rows_read, table.truncated, table.dropped) == (3, 1, 1)
    assert table.where(0).endswith("1.jsonl:2")


def test_a_source_without_any_target_is_an_error_that_names_its_first_row(tmp_path):
    path = data(tmp_path / "1.jsonl", ("a", "b"), ("a", "c"))
    with pytest.raises(
        InputError, match=r"max_length=4: .*1\.jsonl:1 has its first at token 5 of 6 \(2 rows read\); raise max_length"
    ):
        tokenize(DataFiles([path]), word_tokenizer(), max_length=4, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_max_length_must_leave_something_to_predict(tmp_path):
    with pytest.raises(InputError, match="max_length is 1; it must be at least 2"):
        tokenize(DataFiles([data(tmp_path / "1.jsonl", ("a", "b"))]), word_tokenizer(), max_length=1)


def test_notes_are_counted_by_row(tmp_path):
    table = tokenize(
        DataFiles([data(tmp_path / "1.jsonl", ("a", "b"), ("a", "c"))]),
        word_tokenizer(eos=None),
        template="plain",
        max_length=99,
    )
    assert table.notes == {NO_END: 2}


# --------------------------------------------------------------------------------------------------------------- cache


def test_the_cache_gives_the_same_table_without_reading_the_rows(tmp_path, no_reading):
    path, cache = data(tmp_path / "1.jsonl", ("a", "b"), ("a b c d", "c"), ("a", "b c d")), tmp_path / "cache"
    fresh = tokenize(DataFiles([path]), word_tokenizer(), max_length=6, cache=cache)
    no_reading()
    cached = tokenize(DataFiles([path]), word_tokenizer(), max_length=6, cache=cache)
    assert equal(fresh, cached)
    assert equal(fresh, tokenize(DataFiles([path]), used_tokenizer(), max_length=6, cache=cache))
    assert cached.ids.flags.writeable


def used_tokenizer():
    tokenizer = word_tokenizer()
    tokenizer("a b c", truncation=True, max_length=2, padding="max_length")
    return tokenizer


def test_moved_files_are_found_in_the_cache_under_their_new_names(tmp_path, no_reading):
    cache = tmp_path / "cache"
    tokenize(DataFiles([data(tmp_path / "1.jsonl", ("a", "b"))]), word_tokenizer(), max_length=9, cache=cache)
    no_reading()
    moved = data(tmp_path / "elsewhere" / "2.jsonl", ("a", "b"))
    assert tokenize(DataFiles([moved]), word_tokenizer(), max_length=9, cache=cache).where(0) == f"{moved}:1"


CHANGES = {
    "content": {"content": ("a", "c")},
    "format": {"format": "alpaca"},
    "fields": {"fields": {"prompt": "instruction", "response": "output"}},
    "max_rows": {"max_rows": 5},
    "sample_seed": {"max_rows": 5, "sample_seed": 1},
    "template": {"template": "plain"},
    "max_length": {"max_length": 8},
    "vocabulary": {"tokenizer": lambda: word_tokenizer("e")},
    "special tokens": {"tokenizer": lambda: word_tokenizer(bos_token="</s>")},
    "chat template": {"tokenizer": lambda: word_tokenizer(template="a " + TEMPLATE)},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_whatever_decides_about_the_tokens_is_part_of_the_cache_key(tmp_path, change):
    def made_with(content=("a", "b"), tokenizer=word_tokenizer, **settings):
        how = {key: settings.pop(key) for key in ("format", "fields", "max_rows", "sample_seed") if key in settings}
        tokenize(
            DataFiles(data(tmp_path / "1.jsonl", content), **how),
            tokenizer(),
            **({"max_length": 9} | settings),
            cache=tmp_path / "cache",
        )
        return len(list((tmp_path / "cache").iterdir()))

    assert made_with() == 1
    assert made_with(**change) == 2
    assert made_with() == 2


def flip_last_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "one bit flipped": flip_last_byte,
    "counts changed": lambda path: path.write_bytes(path.read_bytes().replace(b'rows_read\\": 1', b'rows_read\\": 2')),
    "another file": lambda path: save_file({"ids": np.arange(3)}, path),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_cache_file_is_made_again(tmp_path, damage, no_reading):
    path, cache = data(tmp_path / "1.jsonl", ("a", "b")), tmp_path / "cache"
    fresh = tokenize(DataFiles([path]), word_tokenizer(), max_length=9, cache=cache)
    (file,) = cache.iterdir()
    sound = file.read_bytes()
    damage(file)
    assert file.read_bytes() != sound, "the test has not damaged the file"
    assert equal(fresh, tokenize(DataFiles([path]), word_tokenizer(), max_length=9, cache=cache))
    no_reading()
    assert equal(fresh, tokenize(DataFiles([path]), word_tokenizer(), max_length=9, cache=cache))


def test_a_format_that_reads_rows_in_another_way_than_before_makes_the_tokens_again(tmp_path, monkeypatch):
    path, cache = data(tmp_path / "1.jsonl", ("a", "b")), tmp_path / "cache"
    for version, files in ((1, 1), (2, 2), (1, 2)):
        monkeypatch.setattr(Alpaca, "version", version)
        tokenize(DataFiles([path]), word_tokenizer(), max_length=9, cache=cache)
        assert len(list(cache.iterdir())) == files


def test_of_many_who_need_the_same_tokens_one_makes_them_and_the_others_wait(tmp_path, monkeypatch):
    path, cache, everyone, made = data(tmp_path / "1.jsonl", ("a", "b")), tmp_path / "cache", Barrier(4), []
    build = module._build
    monkeypatch.setattr(module, "_build", lambda *arguments: made.append(1) or build(*arguments))
    monkeypatch.setattr("bilevel.lock.POLL", 0.01)

    def read(_):
        everyone.wait(10)
        return tokenize(DataFiles([path]), word_tokenizer(), max_length=9, cache=cache)

    with ThreadPoolExecutor(4) as pool:
        tables = list(pool.map(read, range(4)))
    assert all(equal(tables[0], table) for table in tables)
    assert made == [1]
    assert [file.suffix for file in cache.iterdir()] == [".safetensors"]


def test_what_a_killed_writer_has_left_in_the_cache_is_removed_and_what_another_writes_is_not(tmp_path):
    cache, parts = (
        tmp_path / "cache",
        [hidden(tmp_path / "cache" / name) for name in ("gone.safetensors", "alive.safetensors")],
    )
    cache.mkdir()
    for part in parts:
        part.write_text("half")
    with Pool(1) as other:  # another thread
        held = other.apply(lambda: owned(cache / "alive.safetensors", file=True))
        other.apply(held.__enter__)
        tokenize(DataFiles([data(tmp_path / "1.jsonl", ("a", "b"))]), word_tokenizer(), max_length=9, cache=cache)
        other.apply(held.__exit__, (None, None, None))
    assert [part.exists() for part in parts] == [False, True]


def test_a_cache_that_cannot_be_written_is_an_error_before_the_work(tmp_path, no_reading):
    (tmp_path / "file").write_text("")
    no_reading()
    path, cache = data(tmp_path / "1.jsonl", ("a", "b")), tmp_path / "file" / "cache"
    with pytest.raises(InputError, match=r"cache directory .*file/cache cannot be written: .*; set BILEVEL_CACHE"):
        tokenize(DataFiles([path]), word_tokenizer(), max_length=9, cache=cache)


def test_the_cache_directory_follows_the_environment(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("BILEVEL_CACHE", raising=False)
    assert default_cache() == Path("/home/ada/.cache/bilevel")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert default_cache() == Path("/caches/bilevel")
    monkeypatch.setenv("BILEVEL_CACHE", "~/mine")
    assert default_cache() == Path("/home/ada/mine")


# --------------------------------------------------------------------------------------------------------- content hash


def test_the_content_hash_depends_on_contents_and_their_order_alone(tmp_path):
    one, two = data(tmp_path / "1.jsonl", ("a", "b")), data(tmp_path / "2.jsonl", ("a", "c"))
    same = data(tmp_path / "deep" / "1.v2.jsonl", ("a", "b"))
    assert content_hash(DataFiles([one, two])) == content_hash(DataFiles([same, two]))
    assert (
        len(
            {
                content_hash(DataFiles([one])),
                content_hash(DataFiles([two])),
                content_hash(DataFiles([one, two])),
                content_hash(DataFiles([two, one])),
            }
        )
        == 4
    )
    assert tokenize(DataFiles([one]), word_tokenizer(), max_length=9).content_hash == content_hash(DataFiles([one]))


def test_the_content_hash_of_a_saved_data_set_covers_its_files(tmp_path):
    from datasets import Dataset

    for name, answer in (("one", "b"), ("two", "c")):
        Dataset.from_list([{"instruction": "a", "output": answer}]).save_to_disk(str(tmp_path / name))
    assert content_hash(DataFiles([str(tmp_path / "one")])) != content_hash(DataFiles([str(tmp_path / "two")]))
    assert words_of(tokenize(DataFiles([str(tmp_path / "one")]), word_tokenizer(), max_length=9), 0)[-2:] == ["B", "</S>"]


# ------------------------------------------------------------------------------------------------------------ bad rows


def test_rows_that_cannot_be_used_are_left_out_and_counted_and_listed_if_so_asked(tmp_path, caplog):
    path = Path(data(tmp_path / "1.jsonl", ("a", "b"), ("a", "c")))
    path.write_text(path.read_text() + '{"instruction": 1, "output": "b"}\n{\n')
    with pytest.raises(InputError, match=r"1\.jsonl:3: field 'instruction' is a number"):
        tokenize(DataFiles([str(path)]), word_tokenizer(), max_length=9, cache=tmp_path / "cache")
    read = {"max_length": 9, "cache": tmp_path / "cache", "on_bad_row": "skip"}
    for _ in range(2):  # anew, and from the cache
        table = tokenize(DataFiles([str(path)]), word_tokenizer(), **read)
        assert (len(table), table.rows_read, table.bad, len(table.reasons)) == (2, 2, 2, 2)
    with caplog.at_level("WARNING", "bilevel.llm"):
        report_table("source 'web'", table, 9)
    assert "source 'web': 2 rows are left out because they cannot be used" in caplog.text
    assert "1.jsonl:3: field 'instruction' is a number" in caplog.text
    assert "1.jsonl:4: malformed JSON" in caplog.text
    path.write_text("{\n{\n")
    with pytest.raises(InputError, match=r"none of 2 rows can be used; the first: .*1\.jsonl:1: malformed JSON"):
        tokenize(DataFiles([str(path)]), word_tokenizer(), **read)


def test_a_row_that_the_template_refuses_does_not_take_others_of_its_batch_with_it(tmp_path):
    refusing = "{% if 'b' in messages[-1].content %}{{ raise_exception('no b') }}{% endif %}" + TEMPLATE
    path = data(tmp_path / "1.jsonl", ("a", "c"), ("a", "b"), ("a", "d"))
    table = tokenize(DataFiles([path]), word_tokenizer(template=refusing), max_length=9, on_bad_row="skip")
    assert [table.where(row).rpartition(":")[2] for row in range(len(table))] == ["1", "3"]
    assert "no b" in table.reasons[0]
