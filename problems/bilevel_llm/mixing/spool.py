"""Rows on disk for a moment: written in the order of the files, read back in that of the mix."""

import pickle
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray


class Spool:
    """A temporary file with one row a slot, so that a mix of any size takes no more memory than reading its sources.

    directory: where the file is made; it has no name there, and is gone when closed.
    slots: how many rows there will be.
    """

    def __init__(self, directory: Path, slots: int) -> None:
        self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 (closed by __exit__)
        self._starts: NDArray[np.int64] = np.zeros(slots, np.int64)

    def put(self, slot: int, row: Mapping[str, Any]) -> None:
        """Keep a row. All are put before the first is read."""
        self._starts[slot] = self._file.tell()
        pickle.dump(dict(row), self._file, protocol=pickle.HIGHEST_PROTOCOL)  # JSON has no dates, bytes or decimals

    def get(self, slot: int) -> dict[str, Any]:
        """Read a row back."""
        self._file.seek(self._starts[slot])
        row: dict[str, Any] = pickle.load(self._file)
        return row

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
