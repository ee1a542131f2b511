"""Write files and directories so that a reader, or a crash, never meets half of one."""

import io
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # how libraries in Rust put an error of the system into words
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{32}\.part")


def hidden(path: Path) -> Path:
    """A name beside `path`, used by nobody else, for what is to become it; see `remove_leftovers`."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")  # process ids are not unique on a shared disk


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Let the caller write a file or a directory under a hidden name beside `path`, and give it its name at the end.

    Yields the hidden path, at which nothing exists yet. If the caller raises, what it has written is removed and `path` is
    as it was. A file replaces the file that has the name already; a directory does so only if that one is empty, and
    raises `OSError` otherwise. An `OSError` names `path` if it names nothing itself.
    """
    part = hidden(path)
    try:
        with named(path):
            yield part
            write_through(part)
            part.replace(path)
            write_through(path.parent, deep=False)
    except OSError as error:
        if error.filename == str(part):  # a name that nobody has given
            error.filename = str(path)
        raise
    finally:
        remove(part)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace the file at `path` in one step: whoever reads it sees the old content or the new."""
    with written_whole(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


def append_whole(path: Path, data: bytes) -> None:
    """Add to a file, all or nothing: a full disk does not leave half a line for its readers."""
    file = GrowingFile(path)
    try:
        file.append(data)
    finally:
        file.close()


class GrowingFile:
    """A file that is added to again and again, each time all or nothing, and stays open in between.

    What was added is the system's at once: readers of this machine see it, and a kill does not lose it. Other machines that
    share the file system may see it only when the file is closed; the next addition opens it anew.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: io.FileIO | None = None

    def append(self, data: bytes) -> None:
        """Add to the file. Raises `OSError`, naming the file, and leaves it as it was, if there is no room."""
        with named(self.path):
            if self._file is None:
                self._file = self.path.open("ab", buffering=0)
            before = self._file.tell()
            try:
                written = self._file.write(data)
                while written < len(data):  # the rest raises why it did not fit
                    written += self._file.write(data[written:])
            except OSError:
                self._file.truncate(before)
                self.close()
                raise

    def close(self) -> None:
        """Close the file, if it is open."""
        if self._file is not None:
            self._file.close()
            self._file = None


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Let an `OSError` that names no file, as when the disk is full, name this one; also one that is only in a message."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise
    except Exception as error:
        if (code := _OS_ERROR.search(str(error))) is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


def remove(path: Path) -> None:
    """Remove a file or a directory, if it is there. What cannot be removed stays: it is in nobody's way."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        try:
            path.unlink(missing_ok=True)
        except OSError:
            return


def leftovers(directory: Path, *names: str) -> list[Path]:
    """What a writer that was killed has left in a directory.

    names: of the files and directories that it was going to be; all, if none are given.
    """
    found = ((path, _LEFTOVER.fullmatch(path.name)) for path in directory.iterdir()) if directory.is_dir() else ()
    return [path for path, match in found if match is not None and (not names or match["name"] in names)]


def unfinished(directory: Path) -> set[str]:
    """The names that `leftovers` were going to have, other than those of locks."""
    names = {match["name"] for path in leftovers(directory) if (match := _LEFTOVER.fullmatch(path.name))}
    return {name for name in names if not name.startswith(".")}


def remove_leftovers(directory: Path, *names: str) -> None:
    """Remove `leftovers`. Only the owner of what is written there may do so: another writer may be alive."""
    for path in leftovers(directory, *names):
        remove(path)


def write_through(path: Path, *, deep: bool = True) -> None:
    """Wait until a file, or a directory with everything in it, is on the disk.

    A rename, or the removal of an older copy, may otherwise survive a power failure that the content does not.

    deep: what is in a directory, too, and not only the list of its entries.
    """
    inside = list(path.rglob("*")) if deep and path.is_dir() else []
    for each in (*inside, path):
        if each.is_dir() and os.name == "nt":
            continue  # Windows cannot open a directory
        handle = os.open(each, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError:
            if not each.is_dir():  # some file systems do not let a directory be synchronized
                raise
        finally:
            os.close(handle)
