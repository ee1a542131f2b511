"""Rows that occur both in the training data and in a validation set: once memorized, they make validation useless."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from bilevel_llm.data.tokens import TokenTable

_EXAMPLES = 3  # of each source: enough to look them up and see what kind of rows they are


@dataclass(frozen=True)
class Overlap:
    """What training sources and validation sets have in common. True if there is such a row; as text, one clause.

    train: training source -> number of its rows that also occur in some validation set. Every source is listed.
    validation: validation set -> number of its rows that also occur in some training source. Every set is listed.
    examples: training source -> up to three pairs (where the row is there, where in the validation data). Only
        sources that have such rows are listed.
    """

    train: Mapping[str, int]
    validation: Mapping[str, int]
    examples: Mapping[str, tuple[tuple[str, str], ...]]

    def __bool__(self) -> bool:
        return bool(self.examples)

    def __str__(self) -> str:
        if not self:
            return "training and validation data have no row in common"
        sources = (
            f"{self.train[name]} in {name!r} (" + ", ".join(f"{here} = {there}" for here, there in pairs) + ")"
            for name, pairs in self.examples.items()
        )
        return f"rows of the validation data also occur in the training data: {'; '.join(sources)}"


def find_overlap(train: Mapping[str, TokenTable], validation: Mapping[str, TokenTable]) -> Overlap:
    """Compare the rows of all sources with those of all validation sets, both by name.

    Two rows are the same if all their texts are, but for case, white space and Unicode compatibility forms (see
    `rows.fingerprint`). Rows that are merely alike are found by `near_duplicates`; rows that are contained in one
    another are not found, nor are rows that the tables have dropped.
    """
    in_validation = {name: rows_in(table, validation) for name, table in train.items()}
    return Overlap(
        train={name: int(rows.sum()) for name, rows in in_validation.items()},
        validation={name: int(rows_in(table, train).sum()) for name, table in validation.items()},
        examples={
            name: tuple(_pair(train[name], int(row), validation) for row in np.flatnonzero(rows)[:_EXAMPLES])
            for name, rows in in_validation.items()
            if rows.any()
        },
    )


def rows_in(table: TokenTable, others: Mapping[str, TokenTable]) -> NDArray[np.bool_]:
    """Which rows of a table occur in any of the others. Shape: (rows,)."""
    elsewhere = [other.fingerprints for other in others.values()]
    return np.isin(table.fingerprints, np.concatenate(elsewhere)) if elsewhere else np.zeros(len(table), np.bool_)


def _pair(table: TokenTable, row: int, others: Mapping[str, TokenTable]) -> tuple[str, str]:
    """Where a row is, and where it first occurs in the other tables."""
    for other in others.values():
        same = np.flatnonzero(other.fingerprints == table.fingerprints[row])
        if same.size:
            return table.where(row), other.where(int(same[0]))
    raise AssertionError("only rows that occur in both are asked for")


def without_rows(table: TokenTable, fingerprints: Collection[int]) -> TokenTable:
    """The rows of a table whose fingerprint is none of these (see `rows.fingerprint`). May be empty."""
    keep = ~np.isin(table.fingerprints, np.fromiter(fingerprints, np.uint64, len(fingerprints)))
    tokens = np.repeat(keep, table.lengths)
    return replace(
        table,
        ids=table.ids[tokens],
        labels=table.labels[tokens],
        starts=np.concatenate([[0], np.cumsum(table.lengths[keep])]),
        fingerprints=table.fingerprints[keep],
        file=table.file[keep],
        number=table.number[keep],
    )
