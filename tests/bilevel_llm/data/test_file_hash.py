"""A file is hashed once, and again when it may have changed."""

import hashlib
import os
import time
from pathlib import Path

import pytest

from bilevel import InputError
from bilevel_llm.data import file_hash as module
from bilevel_llm.data.file_hash import file_hash


@pytest.fixture
def settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that has not changed for a while, as far as the module's clock says."""
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    monkeypatch.setattr(module.time, "time", lambda: time.monotonic() + 1e12)
    return file


def test_an_unchanged_file_is_read_once(settled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert file_hash(settled, tmp_path / "cache") == hashlib.sha256(b"one").hexdigest()
    monkeypatch.setattr(module.hashlib, "file_digest", lambda *a: pytest.fail("the file was read again"))
    assert file_hash(settled, tmp_path / "cache") == hashlib.sha256(b"one").hexdigest()


def test_a_change_that_keeps_size_and_date_is_noticed(settled: Path, tmp_path: Path) -> None:
    file_hash(settled, tmp_path / "cache")
    facts = settled.stat()
    settled.write_bytes(b"two")
    os.utime(settled, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert file_hash(settled, tmp_path / "cache") == hashlib.sha256(b"two").hexdigest()


def test_a_file_that_is_still_being_written_is_not_remembered(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    file_hash(file, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("damage", ["", "{}", "[1]", '"x"', "\x00"])
def test_a_damaged_memory_is_not_believed(damage: str, settled: Path, tmp_path: Path) -> None:
    file_hash(settled, tmp_path / "cache")
    (entry,) = (tmp_path / "cache").iterdir()
    entry.write_text(damage)
    assert file_hash(settled, tmp_path / "cache") == hashlib.sha256(b"one").hexdigest()


def test_a_memory_that_cannot_be_written_costs_time_alone(settled: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the directory should be")
    assert file_hash(settled, tmp_path / "cache") == hashlib.sha256(b"one").hexdigest()


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere: cannot be read: No such file"):
        file_hash(tmp_path / "nowhere", tmp_path)
