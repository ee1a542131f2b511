"""What is named on the command line of `bilevel init` becomes sources."""

from pathlib import Path

import pytest

from bilevel.errors import InputError
from bilevel_llm.first_recipe.named_sources import named_sources
from tests.bilevel_llm.tiny import alpaca, write_jsonl


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("data/web/a.jsonl", "data/web/b.jsonl", "data/books.jsonl", "data/target.jsonl"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(Path(name), alpaca(name, 2))
    Path("data/README.md").touch()
    Path("empty").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("given", "sources"),
    [
        (["data"], {"books": ["data/books.jsonl"], "web": ["data/web/*.jsonl"]}),
        (["data/books.jsonl", "w=data/web"], {"books": ["data/books.jsonl"], "w": ["data/web/*.jsonl"]}),
        (["web=data/web/*.jsonl"], {"web": ["data/web/*.jsonl"]}),
        (["data/web/*.jsonl"], {"web": ["data/web/*.jsonl"]}),
    ],
    ids=["folder, without the target", "file and named folder", "named glob", "glob"],
)
def test_files_globs_and_folders_are_sources(given: list[str], sources: dict[str, list[str]]) -> None:
    assert named_sources(given, ["data/target.jsonl"]) == sources


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["a=data/target.jsonl"], "is in the source 'a' and is a --target too"),
        (["a=data/books.jsonl", "a=data/web"], "there is a source 'a' already"),
        (["=data/books.jsonl"], "the name before the = is empty"),
        (["empty"], "no data files in this folder"),
        (["a=data/README.md"], "unknown type of file"),
        (["a=nowhere.jsonl"], "no such file"),
    ],
)
def test_what_can_be_no_source_is_refused(given: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        named_sources(given, ["data/target.jsonl"])
