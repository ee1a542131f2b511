"""Files that are hashed while they are written, so that whoever reads one back knows whether it is as it was written."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from bilevel.files import named

CHUNK = 1 << 24
"""Bytes that are written and hashed at a time, at most."""

AHEAD = 8
"""Chunks that are written before they are hashed, at most, so that neither waits for the other at each of them."""


@dataclass(frozen=True)
class Seal:
    """What a file was when it was written: its size in bytes, and its hash."""

    bytes: int
    sha256: str

    __pydantic_config__: ClassVar[Mapping[str, Any]] = {"extra": "forbid"}


def write_sealed(file: Path, parts: Iterable[bytes | memoryview]) -> Seal:
    """Write a file, bring it to the disk, and return its seal. A second thread hashes each chunk while it is written.

    parts: its content, one after the other, as bytes.

    Raises `OSError`, naming the file, if it cannot be written.
    """
    digest, size = hashlib.sha256(), 0
    ahead: deque[Future[None]] = deque()
    with named(file), ThreadPoolExecutor(1, "hash") as hashing, file.open("wb") as stream:
        for part in parts:
            for start in range(0, len(part), CHUNK):
                chunk = part[start : start + CHUNK]
                ahead.append(hashing.submit(digest.update, chunk))
                stream.write(chunk)
                size += len(chunk)
                if len(ahead) > AHEAD:
                    ahead.popleft().result()
        stream.flush()
        os.fsync(stream.fileno())
    # leaving the executor has waited for the rest
    return Seal(size, digest.hexdigest())


def broken(file: Path, seal: Seal) -> str | None:
    """How a file differs from what was sealed, naming it; None if it does not. Raises `OSError` if it cannot be read."""
    size = file.stat().st_size
    if size != seal.bytes:
        return f"{file} has {size:,} bytes, and was written with {seal.bytes:,}"
    with file.open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != seal.sha256:
            return f"{file} is not as it was written: its hash differs"
    return None
