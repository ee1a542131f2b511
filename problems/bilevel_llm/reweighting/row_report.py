"""The weights of single rows, as a file, and whether the rows were drawn often enough to learn them."""

import io
from collections.abc import Iterable, Mapping

import numpy as np
from torch import Tensor

from bilevel import Finding, Stratified
from bilevel_llm.data.tokens import TokenTable

ENOUGH = 5  # draws of a row: its weight is then a mean of a handful of noisy comparisons, no longer one of them


def as_parquet(tables: Mapping[str, TokenTable], weights: Tensor) -> bytes:
    """A table with the columns source, file, row (its line or number in the file, from 1) and weight. The weights sum to 1.

    weights: the weights of the rows of all tables, in their order. Shape: (rows,).
    """
    import pyarrow as pa
    from pyarrow.parquet import write_table

    files = [str(table.files[file]) for table in tables.values() for file in table.file]
    table = pa.table({
        "source": pa.array(np.repeat(list(tables), list(map(len, tables.values()))).tolist()).dictionary_encode(),
        "file": pa.array(files).dictionary_encode(),
        "row": np.concatenate([table.number for table in tables.values()]),
        "weight": weights.double().numpy(),
    })  # fmt: skip
    buffer = io.BytesIO()
    write_table(table, buffer)
    return buffer.getvalue()


def rarely_drawn(names: Iterable[str], sampler: Stratified, batches: int) -> Finding | None:
    """A flagged finding if rows were drawn too seldom for weights of their own, or else None.

    batches: the number of training batches that moved the weights.
    """
    each = batches * sampler.batch_size / len(sampler.sizes)
    name, size = max(zip(names, sampler.sizes, strict=True), key=lambda source: source[1])
    if each >= ENOUGH * size or not batches:
        return None
    words = (
        f"rows seen too seldom: a row of {name!r} was drawn {each / size:.1f} times while weights moved, and a weight from "
        f"so few draws is mostly noise; run {ENOUGH * size / each:.1f} times the steps, or take {{per: scorer}} as "
        "problem.granularity"
    )
    return Finding("rows-seldom", True, words)
