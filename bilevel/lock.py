"""One owner at a time: a lock on the directory or file that a command writes, which names its owner.

The lock of a directory is a directory `.lock` in it; that of a file is `.NAME.lock` beside it. In it is one file,
`owner-TOKEN`. It is made under another name and renamed: a rename onto a directory that holds something fails, also on
network file systems, where other locks are not reliable. Its owner touches it every few seconds. It is stale if its owner
ran on this machine and is gone, or ran elsewhere and has not touched it for some time; times are compared only with
themselves, as clocks differ. It is taken over by a rename of `owner-TOKEN`, which one process alone can do.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar, Literal

from bilevel.documents import read_json
from bilevel.errors import DamagedError, InputError, RunError
from bilevel.files import hidden, remove, remove_leftovers, write_atomic

log = logging.getLogger("bilevel")

BEAT = 5.0  # seconds between two touches of a lock
STALE = 60.0  # seconds without one after which an owner on another machine is taken to be dead
POLL = 0.5  # seconds between two looks at the lock of another
ATTEMPTS = (
    100  # to make a lock whose directory other processes remove at the same time; some places, such as /proc, never have one
)

_OWNER = "owner-"


@dataclass(frozen=True)
class Owner:
    """Who holds a lock.

    host, pid: the machine and the process.
    machine: the boot and the namespace of processes in which `pid` means something; empty where they are unknown.
    began: when the process began, in clock ticks of that boot, as process ids are used again; 0 where it is unknown.
    since: when the lock was taken, in UTC.
    token: nobody else's.
    """

    host: str
    pid: int
    machine: str
    began: int
    since: str
    token: str

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    @classmethod
    def me(cls) -> Owner:
        """This process."""
        pid, now = os.getpid(), datetime.now(UTC).isoformat(timespec="seconds")
        return cls(socket.gethostname(), pid, _machine(), _began(pid) or 0, now, uuid.uuid4().hex)

    @property
    def gone(self) -> bool | None:
        """Whether the process has ended. None: it cannot be known here."""
        if (self.host, self.machine) != (socket.gethostname(), _machine()):
            return None
        began = _began(self.pid)
        if began is not None:
            return began != self.began
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return bool(_machine())  # where /proc exists, the process has ended since it was looked up there

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since.replace('T', ' ').replace('+00:00', ' UTC')}"


class Lock:
    """A lock that this process holds."""

    def __init__(self, path: Path, lock: Path, owner: Owner) -> None:
        self.path = path
        self._lock = lock
        self._file = lock / f"{_OWNER}{owner.token}"
        self._lost = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"lock of {path}", daemon=True)
        self._thread.start()

    def require(self) -> None:
        """Raise `RunError` if another process has taken over, as it does from one that did not run for `STALE` seconds."""
        if self._lost:
            raise RunError(f"{self.path} was taken over by another process while this one stood still; this one ends")

    def release(self) -> None:
        """Give the lock back, if it is still held."""
        self._end.set()
        self._thread.join()
        if self._file.exists():
            _clear(self._lock)

    def _beat(self) -> None:
        while not self._end.wait(BEAT):
            try:
                os.utime(self._file)
            except OSError:  # also where a file system is away for a moment, or the user has removed the directory
                self._lost = _owner_file(self._lock) not in (None, self._file)
                if self._lost:
                    return


_mine = threading.local()  # .locks: those of this thread, so that what it calls may ask for the same again


@contextmanager
def owned(path: Path, *, file: bool = False, wait: bool = False) -> Iterator[Lock]:
    """Hold the lock of a directory, which is made if it is missing, or of a file. The same thread may hold it again inside.

    file: whether `path` is, or becomes, a file or a directory that appears as a whole.
    wait: wait for another owner instead of raising.

    A directory that was made for the lock, and in which nothing was written, is removed again.

    Raises `InputError`, naming the owner, if another process holds it, and `OSError` if no lock can be written there.
    """
    path = path.absolute()
    locks: dict[Path, Lock] = _mine.__dict__.setdefault("locks", {})
    place = path.resolve()
    if place in locks:
        yield locks[place]
        return
    lock_path = path.with_name(f".{path.name}.lock") if file else path / ".lock"
    directory = lock_path.parent
    made = [parent for parent in (directory, *directory.parents) if not parent.exists()]
    try:
        locks[place] = lock = _take(path, lock_path, wait)
        try:
            if not file:
                _clear_stale(path)
            yield lock
        finally:
            del locks[place]
            lock.release()
    finally:
        for parent in made:
            try:
                parent.rmdir()
            except OSError:  # something was written
                break


def is_lock(path: Path) -> bool:
    """Whether this is the lock of the directory it is in."""
    return path.name == ".lock"


def _take(path: Path, lock: Path, wait: bool) -> Lock:
    owner, watch, said = Owner.me(), _Watch(lock), False
    while not _make(lock, owner):
        state = watch.look()
        if state == "stale":
            if _take_over(watch.file, lock, owner):
                break
            watch = _Watch(lock)  # another process was quicker
        elif state == "alive" and not wait:
            raise InputError(
                f"{path} is in use by {watch.owner or 'another process'}; wait until that has ended, "
                "or choose another --output"
            )
        elif state != "free":
            if not said:
                log.info("%s is in use by %s; waiting", path, watch.owner or "another process")
            said = True
            time.sleep(POLL)
    remove_leftovers(lock.parent, lock.name)  # whoever is about to make one tries again
    return Lock(path, lock, owner)


def _clear_stale(directory: Path) -> None:
    """Take away what processes that are gone have left below a directory: nobody else may ever ask for those locks again."""
    for parent, names, _ in os.walk(directory):
        for lock in (Path(parent, name) for name in names if name.endswith(".lock")):
            watch = _Watch(lock)
            if watch.look() == "stale" and _take_over(watch.file, lock, Owner.me()):
                _clear(lock)


class _Watch:
    """Looks at a lock again and again, to see whether its owner still touches it."""

    def __init__(self, lock: Path) -> None:
        self.lock = lock
        self.file: Path | None = None
        self.owner: Owner | None = None
        self._touched = 0
        self._quiet_since = 0.0

    def look(self) -> Literal["free", "stale", "alive", "unknown"]:
        """What is known of the lock now."""
        file = _owner_file(self.lock)
        if file is None and not self.lock.exists():
            return "free"
        touched, owner = 0, None
        try:
            if file is not None:
                with file.open("rb") as stream:  # to open a file makes a network file system look again
                    touched = os.fstat(stream.fileno()).st_mtime_ns
                owner = read_json(file, Owner)
        except FileNotFoundError:
            return "free"  # for a moment
        except (DamagedError, OSError):
            owner = None
        now = time.monotonic()
        if not self._quiet_since or file != self.file:
            self.file, self._touched, self._quiet_since = file, touched, now
        self.owner = owner
        if owner is not None and owner.gone is not None:
            return "stale" if owner.gone else "alive"
        if touched != self._touched:
            self._touched, self._quiet_since = touched, now
            return "alive"
        return "stale" if now - self._quiet_since > STALE else "unknown"


def _owner_file(lock: Path) -> Path | None:
    """The file that says who holds the lock; None if there is no such lock."""
    try:
        return next((path for path in lock.iterdir() if path.name.startswith(_OWNER)), None)
    except OSError:
        return None


def _make(lock: Path, owner: Owner) -> bool:
    """Whether the lock could be made. Raises `OSError` where nothing can be written."""
    for attempt in range(ATTEMPTS):
        part = hidden(lock)
        lock.parent.mkdir(parents=True, exist_ok=True)  # who held it before may have removed what was empty
        try:
            part.mkdir()
            (part / f"{_OWNER}{owner.token}").write_text(json.dumps(asdict(owner)))
            part.rename(lock)
            return True
        except OSError as error:
            remove(part)
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                return False  # it was there a moment ago
            if not isinstance(error, FileNotFoundError) or attempt == ATTEMPTS - 1:
                raise
    return False


def _take_over(stale: Path | None, lock: Path, owner: Owner) -> bool:
    """Take over the lock that `stale` was found to hold. Whether this process has it now."""
    if stale is None:  # no owner, but something else in it
        _clear(lock)
        return False
    mine = lock / f"{_OWNER}{owner.token}"
    try:
        stale.rename(mine)  # still with the words of the one who is gone, so that a kill just now leaves a stale lock
    except FileNotFoundError:
        return False
    write_atomic(mine, json.dumps(asdict(owner)))
    return True


def _clear(lock: Path) -> None:
    """Take a lock away, in one step, so that no half of it is ever seen."""
    aside = hidden(lock)
    try:
        lock.rename(aside)
    except OSError:
        return
    remove(aside)


def _machine() -> str:
    """The boot and the namespace of processes; empty where there is no /proc."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _began(pid: int) -> int | None:
    """When a process began, in clock ticks since the boot; None if there is none, or if it cannot be known."""
    try:
        facts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if facts[0] in "ZX" else int(facts[19])  # a zombie has ended
