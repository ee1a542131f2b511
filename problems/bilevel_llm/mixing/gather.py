"""Find the rows of a mix again in the data files, and keep them for writing."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bilevel.errors import RunError
from bilevel_llm.data.files import pass_over
from bilevel_llm.data.reading import RawRow, read_raw_rows
from bilevel_llm.data.settings import DataSet
from bilevel_llm.data.tokens import TokenTable
from bilevel_llm.mixing.spool import Spool

Written = Callable[[RawRow], Mapping[str, Any]]
"""A row of a data file -> the fields of that row in the mix."""


def gather(
    tables: Sequence[TokenTable], data: Sequence[DataSet], needed: NDArray[np.int64], written: Written, spool: Spool
) -> None:
    """Read each data file once, and put into slot i of the spool the row needed[i].

    needed: rows of all tables, numbered through from the first table's first row, ascending. Shape: (slots,).

    Raises `RunError` if a row is no longer there.
    """
    offset = 0
    for table, read in zip(tables, data, strict=True):
        first, last = np.searchsorted(needed, (offset, offset + len(table)))
        rows = needed[first:last] - offset
        for index, file in enumerate(table.files):
            here = np.flatnonzero(table.file[rows] == index)
            slots = dict(zip(table.number[rows[here]].tolist(), (here + first).tolist(), strict=True))
            if slots:
                _gather_from(file, read, slots, written, spool)
        offset += len(table)


def _gather_from(file: Path, data: DataSet, slots: dict[int, int], written: Written, spool: Spool) -> None:
    for row in read_raw_rows(file, data.format, None, pass_over, data.fields):  # those that are needed are not bad
        slot = slots.pop(row.number, None)
        if slot is not None:
            spool.put(slot, written(row))
        if not slots:
            return
    raise RunError(f"{file}: row {min(slots)} is not there any more: the file changed while the mix was being written")
