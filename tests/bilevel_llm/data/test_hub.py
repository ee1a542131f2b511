"""Data sets of the hub, and paths that could be one: with a network, without one, and from the caches. No test uses a network."""

import json
import shutil
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from datasets.packaged_modules.json.json import Json
from huggingface_hub.errors import RepositoryNotFoundError

from bilevel import InputError
from bilevel_llm.data import hub
from bilevel_llm.data.reading import each_row
from bilevel_llm.data.settings import DataFiles
from tests.bilevel_llm.tiny import alpaca, write_jsonl

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """The questions that the hub is asked, and nobody answers; empty caches."""
    questions = []

    def nobody_there(self, repo, **settings):
        questions.append(repo)
        raise OSError("Name or service not known")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", nobody_there)
    hub.hub_files.cache_clear()
    yield questions
    hub.hub_files.cache_clear()


@pytest.fixture
def answered(asked, monkeypatch):
    """A hub that knows every data set."""
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, repo, **settings: asked.append(repo))
    return asked


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """What `datasets` leaves in its cache of a data set with two splits."""
    place = tmp_path_factory.mktemp("loaded")
    files = {split: [str(write_jsonl(place / f"{split}.jsonl", alpaca(split, 5)))] for split in ("train", "test")}
    datasets.disable_progress_bars()
    builder = Json(cache_dir=str(place / "made"), dataset_name="name", data_files=files, hash=COMMIT)
    builder.download_and_prepare()
    datasets.enable_progress_bars()
    return Path(builder.cache_dir)


@pytest.fixture
def in_cache(loaded, asked, tmp_path):
    shutil.copytree(loaded, tmp_path / "datasets" / "owner___name" / "default" / "0.0.0" / COMMIT)


def texts(data):
    return [row.turns[0].text for path in data.files() for row in each_row(path)]


def test_without_a_network_the_cache_is_read_after_one_question(in_cache, asked, caplog):
    with caplog.at_level("INFO"):
        assert texts(DataFiles("owner/name", split="test")) == [f"test {i}" for i in range(5)]
        assert texts(DataFiles("hf://datasets/owner/name", split="train")) == [f"train {i}" for i in range(5)]
    assert asked == ["owner/name", "owner/name"]
    assert "owner/name: there is no network (Name or service not known); the version in the cache is used" in caplog.text
    assert not datasets.config.HF_HUB_OFFLINE, "the library is left as it was"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DataFiles("owner/name"), "there are the splits train, test; say which, as in split: train"),
        (DataFiles("owner/name", split="trian"), r"no split 'trian'; did you mean 'train'\?"),
        (DataFiles("owner/name", split="train[:10%]"), "is not the name of a split; for a part of one, set max_rows"),
        (DataFiles("owner/name", split="train", subset="other"), r"not in the cache .*Available configs in the cache: \['default'\]"),
        (DataFiles("owner/name@v2", split="train"), "the version in the cache is not known to be v2; leave @v2 out"),
        (DataFiles("owner/nam", split="train"), "owner/nam: there is no network .*not in the cache; load it once where there is a network, or name files"),
        (DataFiles("hf://owner/name"), "a path on the hub begins with hf://datasets/"),
        (DataFiles("hf://datasets/owner"), "a data set of the hub is named owner/name"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_said_in_one_sentence(in_cache, data, message):
    with pytest.raises(InputError, match=message) as raised:
        data.files()
    assert "\n" not in str(raised.value)


def test_a_known_commit_is_found_in_the_cache(in_cache):
    assert len(DataFiles(f"owner/name@{COMMIT}", split="train").files()) == 1


def test_a_name_that_could_be_a_path_is_read_in_both_ways(asked, tmp_path):
    with pytest.raises(
        InputError, match=r"own/web is no file or folder here \(looked up from .*\), and was taken for a data set of the hub"
    ):
        DataFiles("own/web").files()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "wob").mkdir()
    asked.clear()
    with pytest.raises(
        InputError,
        match=r"no such file: data/web .*did you mean 'wob'\?; if the data set data/web of the hub is meant, write hf://datasets/data/web",
    ):
        DataFiles("data/web").files()
    for missing in ("gone/web.jsonl", "gone/*", "gone"):
        with pytest.raises(InputError, match="no (such )?file"):
            DataFiles(missing).files()
    assert asked == [], "a name of something here is not sent to the hub"


def test_what_is_here_is_read_from_here(asked, tmp_path):
    (tmp_path / "owner").mkdir()
    write_jsonl(tmp_path / "owner" / "name.jsonl", alpaca("here", 1))
    assert texts(DataFiles("owner/name.jsonl")) == ["here 0"]
    assert asked == []


def test_with_a_network_the_library_loads_it_and_no_code_of_it_runs(answered, in_cache, monkeypatch):
    calls = []
    really = datasets.load_dataset

    def load(repo, subset=None, **settings):
        calls.append((repo, subset, settings))
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        return really(repo)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(DataFiles("owner/name@main", subset="default", split="train").files()) == 1
    assert calls == [("owner/name", "default", {"revision": "main", "keep_in_memory": False})]
    monkeypatch.setattr(datasets, "__version__", "3.6.0")
    with pytest.raises(InputError, match=r"datasets 3\.6\.0 may run code that comes with a data set; version 4 and later"):
        DataFiles("owner/name", split="test").files()


def test_a_data_set_that_the_hub_does_not_have_is_not_looked_for_in_the_cache(in_cache, monkeypatch):
    def missing(self, repo, **settings):
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", missing)
    with pytest.raises(InputError, match="the hub has no such data set, or it is private"):
        DataFiles("owner/name", split="train").files()


@pytest.fixture
def repository(asked, tmp_path):
    """What `huggingface_hub` leaves in its cache of two files of a repository."""
    place = tmp_path / "hub" / "datasets--owner--name"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT)
    folder = place / "snapshots" / COMMIT / "data"
    folder.mkdir(parents=True)
    for name in ("a", "b"):
        write_jsonl(folder / f"{name}.jsonl", alpaca(name, 2))


def test_files_of_a_repository_are_read_as_they_are(repository, caplog):
    assert texts(DataFiles("hf://datasets/owner/name/data/a.jsonl")) == ["a 0", "a 1"]
    assert "may be more" not in caplog.text
    assert len(texts(DataFiles("hf://datasets/owner/name/data/*.jsonl"))) == 4
    assert "there is no network (Name or service not known); there may be more files than the 2 in the cache" in caplog.text
    for missing, message in (("data/c.jsonl", "no such file in the cache"), ("data", "no such file in the cache")):
        with pytest.raises(InputError, match=f"hf://datasets/owner/name/{missing}: {message}"):
            DataFiles(f"hf://datasets/owner/name/{missing}").files()
    with pytest.raises(InputError, match="the files are named, so that split and subset have no meaning"):
        DataFiles("hf://datasets/owner/name/data/a.jsonl", split="train").files()
    with pytest.raises(
        InputError, match="owner/other/a.jsonl: there is no network .*, and the data set is not in the cache; load"
    ):
        DataFiles("hf://datasets/owner/other/a.jsonl").files()


def test_the_split_of_a_saved_data_set_can_be_named(asked, tmp_path):
    saved = datasets.DatasetDict({s: datasets.Dataset.from_list(alpaca(s, 2)) for s in ("train", "test")})
    saved.save_to_disk(str(tmp_path / "saved"))
    assert texts(DataFiles(str(tmp_path / "saved"), split="test")) == ["test 0", "test 1"]
    with pytest.raises(InputError, match=r"saved: there is no split 'val'; known: test, train"):
        DataFiles(str(tmp_path / "saved"), split="val").files()
    plain = str(write_jsonl(tmp_path / "a.jsonl", alpaca("a", 1)))
    with pytest.raises(InputError, match=r"split: train has no meaning for .*a\.jsonl: plain files have none"):
        DataFiles(plain, split="train").files()
    assert json.loads(Path(plain).read_text())
