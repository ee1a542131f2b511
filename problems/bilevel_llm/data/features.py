"""Features of rows, for a scorer: functions that plugins register, and two of our own.

A feature function takes the `SourceRows` of one source and gives named columns, one number a row:

    def shouting(source: SourceRows) -> Mapping[str, ArrayLike]:
        texts = ["".join(turn.text for turn in row.turns) for row in source.rows]
        return {"capitals": [sum(map(str.isupper, text)) / max(1, len(text)) for text in texts]}

It is called once for each source, so a column must mean the same for all of them: it is a function of the row alone.
Scales do not matter: columns are standardized over all rows. It is registered by the hook `bilevel_features`.
"""

import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bilevel.errors import InputError
from bilevel_llm.data.rows import Row
from bilevel_llm.data.settings import DataSet
from bilevel_llm.data.tokens import TokenTable, rows_of

WORD_COLUMNS = 64  # enough that the frequent words of a corpus seldom share one, few enough for some hundred steps
_MOST_BYTES = 2 << 30  # the features of all rows are held in float64, and read by every forward


@dataclass(frozen=True)
class SourceRows:
    """What a feature function sees of a source.

    name: the source's name.
    table: its rows as tokens, with labels, without what was cut at max_length.
    data: where its rows were read from; None: files whose rows' format is detected.
    """

    name: str
    table: TokenTable
    data: DataSet | None = None

    @cached_property
    def rows(self) -> list[Row]:
        """The whole rows as text, in the order of the table. The files are read on first access."""
        return rows_of(self.table, self.data)


Features: TypeAlias = Callable[[SourceRows], Mapping[str, ArrayLike]]


def length(source: SourceRows) -> Mapping[str, ArrayLike]:
    """Two columns: the logarithm of the number of a row's tokens, and the share of them that is labelled."""
    table = source.table
    return {"log_tokens": np.log(table.lengths), "labelled_share": table.supervised / table.lengths}


def hashed_words(source: SourceRows) -> Mapping[str, ArrayLike]:
    """A hashed bag of words (Weinberger et al., arXiv 0902.2206): `WORD_COLUMNS` columns.

    The words of all turns, in lower case, each counted with a sign in a column that its hash decides; the columns of a row
    have norm 1, so that its length does not enter.
    """
    bags = np.array([_bag(row) for row in source.rows])
    bags /= np.maximum(np.linalg.norm(bags, axis=1, keepdims=True), 1e-12)
    return {f"{column:02d}": bags[:, column] for column in range(WORD_COLUMNS)}


def load_features(names: Sequence[str]) -> dict[str, Features]:
    """The registered functions of these names. Raises `InputError` naming the nearest known one."""
    from bilevel.plugins import load_plugins

    plugins = load_plugins()
    return {name: plugins.find("features", name).load() for name in names}


def feature_matrix(
    functions: Mapping[str, Features], sources: Sequence[SourceRows]
) -> tuple[list[str], NDArray[np.float64]]:
    """The columns of all functions for the rows of all sources.

    functions: by name.

    Returns the columns' names, as "function.column", and the values, of shape (rows, d).
    Raises `InputError`, naming the function and the source or row, if a function fails, gives anything but one
    finite number per row, or different columns for different sources, and if the matrix is too large to hold.
    """
    blocks = [_block(name, function, sources) for name, function in functions.items()]
    names = [name for names, _ in blocks for name in names]
    size = 8 * sum(len(source.table) for source in sources) * len(names)
    if size > _MOST_BYTES:
        raise InputError(
            f"problem.granularity.features: {len(names)} features of all rows take {size / 1e9:.1f} GB, more than "
            f"{_MOST_BYTES / 1e9:.1f}; take fewer features or fewer rows"
        )
    return names, np.concatenate([values for _, values in blocks], axis=1)


def _block(name: str, function: Features, sources: Sequence[SourceRows]) -> tuple[list[str], NDArray[np.float64]]:
    """The columns of one function for all sources."""
    parts: list[NDArray[np.float64]] = []
    known: list[str] = []
    for source in sources:
        columns = _call(name, function, source)
        known = known or list(columns)
        if list(columns) != known:
            raise InputError(f"the features {name!r} have different columns for source {source.name!r} from those before it")
        values = [_column(f"{name}.{column}", values, source) for column, values in columns.items()]
        parts.append(np.stack(values, axis=1))
    return [f"{name}.{column}" for column in known], np.concatenate(parts)


def _call(name: str, function: Features, source: SourceRows) -> Mapping[str, ArrayLike]:
    try:
        columns = function(source)
    except InputError:
        raise
    except Exception as error:  # somebody else's code
        raise InputError(f"the features {name!r} fail on source {source.name!r}: {type(error).__name__}: {error}") from error
    if not isinstance(columns, Mapping) or not columns:
        raise InputError(
            f"the features {name!r} must give a mapping of column name to values, and gave {type(columns).__name__}"
        )
    return columns


def _column(name: str, given: ArrayLike, source: SourceRows) -> NDArray[np.float64]:
    try:
        values = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"the feature {name!r} of source {source.name!r} is not an array of numbers: {error}") from error
    if values.shape != (len(source.table),):
        raise InputError(
            f"the feature {name!r} of source {source.name!r} has shape {values.shape}; it must be one number for each of "
            f"the {len(source.table)} rows"
        )
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise InputError(f"the feature {name!r} is {values[bad[0]]} for the row {source.table.where(int(bad[0]))}")
    return values


def _bag(row: Row) -> list[float]:
    bag = [0.0] * WORD_COLUMNS
    for turn in row.turns:
        for word in re.findall(r"\w+", turn.text.lower()):
            column, sign = _place(word)
            bag[column] += sign
    return bag


@lru_cache(maxsize=1 << 16)
def _place(word: str) -> tuple[int, int]:
    """The column and the sign of a word. Python's own hash would differ from run to run."""
    code = zlib.crc32(word.encode())
    return code % WORD_COLUMNS, 1 if code >> 31 else -1
