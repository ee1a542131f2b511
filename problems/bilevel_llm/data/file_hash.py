"""The hash of a whole file, remembered for as long as the file does not change."""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import suppress
from pathlib import Path

from bilevel.errors import InputError
from bilevel.files import write_atomic

_SETTLED = 2.0  # seconds; a file that changed less than this ago could change again without a new time on some file systems


def file_hash(path: Path, cache: Path) -> str:
    """SHA-256 of the file's content.

    cache: a directory that remembers it, under the file's path, for the same size, inode, and times of change. If it cannot
        be written to, nothing is remembered.

    Raises `InputError` if the file cannot be read.
    """
    try:
        place = path.resolve()
        facts = place.stat()
        known = {"size": facts.st_size, "inode": facts.st_ino, "mtime": facts.st_mtime_ns, "ctime": facts.st_ctime_ns}
        entry = cache / f"{hashlib.sha256(str(place).encode(errors='surrogateescape')).hexdigest()}.json"
        if (remembered := _recall(entry, known)) is not None:
            return remembered
        with place.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if time.time() - max(facts.st_mtime, facts.st_ctime) > _SETTLED:
        with suppress(OSError):
            cache.mkdir(parents=True, exist_ok=True)
            write_atomic(entry, json.dumps({**known, "sha256": digest}))
    return digest


def _recall(entry: Path, known: dict[str, int]) -> str | None:
    """What was remembered for a file of which all this is still true; None if nothing was, or if it cannot be read."""
    try:
        found = json.loads(entry.read_text())
        if {key: found[key] for key in known} != known:
            return None
        digest = found["sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return digest if isinstance(digest, str) and len(digest) == hashlib.sha256().digest_size * 2 else None
