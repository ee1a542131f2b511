"""Write files and directories so that a reader, or a crash, never meets half of one."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Let the caller write a file or a directory under a hidden name beside `path`, and give it its name at the end.

    Yields the hidden path, at which nothing exists yet. If the caller raises, what it has written is removed and `path` is
    as it was. A file replaces the file that has the name already; a directory does so only if that one is empty, and
    raises `OSError` otherwise.
    """
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")  # process ids are not unique on a shared disk
    try:
        yield part
        for file in [part] if part.is_file() else part.rglob("*"):
            if file.is_file():
                _write_through(file)
        part.replace(path)
    finally:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace the file at `path` in one step: whoever reads it sees the old content or the new."""
    with written_whole(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


def _write_through(file: Path) -> None:
    """Wait until the content is on the disk: a rename may otherwise survive a power failure that the content does not."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
