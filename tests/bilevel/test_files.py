import errno
import io
from pathlib import Path
from typing import Any

import pytest

from bilevel.files import GrowingFile, named, write_atomic, written_whole


def test_nobody_sees_a_file_before_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "rows.jsonl"
    target.write_text("old")
    with written_whole(target) as part:
        part.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_a_directory_appears_with_everything_in_it(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with written_whole(target) as part:
        (part / "shards").mkdir(parents=True)
        (part / "shards" / "0").write_text("weights")
        assert not target.exists()
    assert (target / "shards" / "0").read_text() == "weights"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("as_directory", [False, True])
def test_a_writer_that_fails_leaves_nothing_behind(tmp_path: Path, as_directory: bool) -> None:
    def fail() -> None:
        with written_whole(tmp_path / "target") as part:
            if as_directory:
                part.mkdir()
            (part / "half" if as_directory else part).write_text("half")
            raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="the disk is full"):
        fail()
    assert not list(tmp_path.iterdir())


def test_a_directory_never_replaces_one_that_holds_something(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "weights").write_text("precious")

    def overwrite() -> None:
        with written_whole(target) as part:
            part.mkdir()

    with pytest.raises(OSError, match="not empty"):
        overwrite()
    assert (target / "weights").read_text() == "precious"


def test_text_and_bytes_are_written_as_they_are(tmp_path: Path) -> None:
    write_atomic(tmp_path / "text", "α\n")
    write_atomic(tmp_path / "bytes", b"\x00\xff")
    assert (tmp_path / "text").read_bytes() == "α\n".encode()
    assert (tmp_path / "bytes").read_bytes() == b"\x00\xff"


def test_an_error_names_the_file_that_was_to_be_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file") as raised:
        write_atomic(tmp_path / "missing" / "out.json", "{}")
    assert raised.value.filename == str(tmp_path / "missing" / "out.json")


def test_an_error_that_a_library_put_into_words_is_one_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as caught, named(tmp_path / "a"):
        raise Exception("No space left on device (os error 28)")  # as `tokenizers` does

    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "a")
    with pytest.raises(ValueError, match="as it is"), named(tmp_path / "a"):
        raise ValueError("as it is")


def test_what_is_added_to_a_growing_file_is_seen_at_once_though_it_stays_open(tmp_path: Path) -> None:
    file = GrowingFile(tmp_path / "metrics.jsonl")
    for count in range(1, 4):
        file.append(b"line\n")
        assert (tmp_path / "metrics.jsonl").read_bytes() == count * b"line\n"
        if count == 1:
            opened = file._file
    assert file._file is opened
    file.close()
    file.append(b"more\n")  # it is opened anew
    file.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"line\nline\nline\nmore\n"


def test_what_does_not_fit_leaves_a_growing_file_as_it_was(tmp_path: Path) -> None:
    class Full(io.FileIO):
        """Takes three bytes more, and no others."""

        room = 3

        def write(self, data: Any) -> int:
            if not self.room:
                raise OSError(errno.ENOSPC, "No space left on device")
            taken, self.room = min(self.room, len(data)), 0
            return super().write(data[:taken])

    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"line\n")
    file = GrowingFile(path)
    file._file = Full(path, "ab")
    with pytest.raises(OSError, match="No space left") as raised:
        file.append(b"more\n")
    assert raised.value.filename == str(path)
    assert path.read_bytes() == b"line\n"
    file.append(b"more\n")  # there is room again
    file.close()
    assert path.read_bytes() == b"line\nmore\n"
