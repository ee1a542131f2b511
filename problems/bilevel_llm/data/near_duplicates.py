"""Rows of the training data that are nearly rows of the validation or test data, found by MinHash (extra `near-duplicates`).

Two rows are near-duplicates if the Jaccard similarity of their shingles, all runs of three words, is at least 0.7, and they
are not equal (`overlap` finds these). Three words are the shortest runs that rows about different things hardly share; one
word that is changed in a text of 20 leaves a similarity of 0.71, and one in a longer text leaves more. System prompts,
which whole data sets share, do not count.

MinHash (Broder 1997) only proposes pairs, of which the similarity is then computed: no pair is reported wrongly. With 256
permutations in 64 bands of 4, a pair of similarity s is missed with probability (1 - s^4)^64, taken over permutations: 2e-8
at 0.7. Permutations are drawn once, so that pairs with a row in common are missed together; 128 of them, which would miss
1.5e-4 on average, missed one in sixty pairs with one row. A row of which less than 0.7 of the shingles occur anywhere in
the other data cannot be a near-duplicate, and is left out before that.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import re
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bilevel.documents import read_json
from bilevel.errors import DamagedError
from bilevel.files import write_atomic
from bilevel.lock import owned
from bilevel_llm.data.files import OnBad, raise_it
from bilevel_llm.data.reading import each_row
from bilevel_llm.data.rows import Row, fingerprint
from bilevel_llm.data.sample import sampled
from bilevel_llm.data.settings import DataSet
from bilevel_llm.data.tokens import TokenTable, content_hash, default_cache, read_again

log = logging.getLogger("bilevel.llm")

SIMILAR = 0.7
WORDS = 3  # of a shingle
PERMUTATIONS, BANDS = 256, 64
MOST_TRAINING, MOST_TARGET = 200_000, 20_000
"""Rows that are looked at: random samples of more. They bound the time."""
_COMPARED = (
    20  # proposals, those with the most equal hashes, that are compared with a row: rows from a template propose each other
)

_VERSION = 1  # to be raised whenever other pairs are found in the same rows
_EXAMPLES = 3  # of each source, as of equal rows
_SPACELESS = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"  # scripts without spaces: a character counts as a word
_WORD = re.compile(rf"[{_SPACELESS}]|[^\W{_SPACELESS}]+")
_MIXERS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], np.uint64)

Shingles = NDArray[np.uint64]


@dataclass(frozen=True)
class Rows:
    """The rows of a set.

    identity: what says which rows these are, and where, as plain data.
    count: how many there are; None for targets, of which all are read.
    read: reads them, or those of these numbers, in order.
    """

    identity: Any
    count: int | None
    read: Callable[[NDArray[np.int64] | None], Iterator[Row]]


@dataclass(frozen=True)
class NearDuplicates:
    """What was found. True if anything was; as text, a sentence for the log.

    train: source -> number of its rows, of those that were looked at, that are near-duplicates of a row of the others.
    examples: source -> up to three of these: where the row is, where the other one is, and how similar they are.
    looked_at: source -> number of rows that were looked at, and of all of them.
    """

    train: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[tuple[str, str, float]]] = field(default_factory=dict)
    looked_at: dict[str, tuple[int, int]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.examples)

    def __str__(self) -> str:
        if not self:
            return "no row of the training data is nearly one of the others"
        parts = []
        for name, examples in self.examples.items():
            looked_at, rows = self.looked_at[name]
            of = "" if looked_at == rows else f" of {looked_at:,} rows, a sample of {rows:,},"
            shown = ", ".join(f"{here} ≈ {there}, {similarity:.2f}" for here, there, similarity in examples)
            parts.append(f"{self.train[name]:,}{of} in {name} ({shown})")
        return "; ".join(parts)


def rows_of_table(table: TokenTable, data: DataSet) -> Rows:
    """The rows of a table that was made from these data."""
    identity = [table.training_hash, [str(file) for file in table.files], data.format, data.fields]
    return Rows(identity, len(table), partial(read_again, table, data))


def rows_of_files(data: DataSet, on_bad: OnBad = raise_it) -> Rows:
    """All rows of files of which there is no table."""

    def read(numbers: NDArray[np.int64] | None) -> Iterator[Row]:
        for path in data.files():
            yield from each_row(path, data.format, None, on_bad, data.fields)

    identity = [content_hash(data), [str(file) for file in data.files()], data.format, data.fields]
    return Rows(identity, None, read)


def report_near_duplicates(others: str, train: Mapping[str, Rows], targets: Mapping[str, Rows]) -> None:
    """Log which rows of the training data are nearly rows of the others, if the library is installed that finds them.

    others: what the targets are called.
    """
    if not targets:
        return
    if importlib.util.find_spec("datasketch") is None:
        _say_that_nobody_looks()
        return
    found = find_near_duplicates(train, targets, default_cache() / "near-duplicates")
    if found:
        log.warning("near-duplicates of rows of the %s, which are not left out: %s", others, found)


def find_near_duplicates(train: Mapping[str, Rows], targets: Mapping[str, Rows], kept: Path) -> NearDuplicates:
    """Compare the rows of all sources with those of all validation, or test, sets.

    kept: a directory that remembers the result for the same rows. Another process that looks for it waits.
    """
    identity = [_VERSION, *([name, rows.identity] for rows_of in (train, targets) for name, rows in rows_of.items())]
    file = kept / f"{hashlib.sha256(json.dumps(identity).encode()).hexdigest()}.json"
    kept.mkdir(parents=True, exist_ok=True)
    with owned(file, file=True, wait=True):
        try:
            return read_json(file, NearDuplicates)
        except DamagedError:  # nobody has looked for them yet, or the file can be made again
            found = _find(train, targets)
            write_atomic(file, json.dumps(asdict(found)))
            return found


def shingles_of(row: Row) -> Shingles:
    """The runs of three words of a row, hashed; of a shorter row, all of it. Sorted, each once. Shape: (shingles,)."""
    text = " ".join(turn.text for turn in row.turns if turn.role != "system")
    words = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    hashes = np.array([_hash(word) for word in words], np.uint64)
    length = max(1, min(WORDS, len(hashes)))
    runs = len(hashes) - length + 1
    mixed = np.zeros(runs, np.uint64)
    for place in range(length):
        mixed += hashes[place : place + runs] * _MIXERS[place]
    mixed ^= mixed >> np.uint64(29)
    mixed.sort()
    return mixed[np.append(True, mixed[1:] != mixed[:-1])] if runs else mixed


@lru_cache(maxsize=1 << 18)
def _hash(word: str) -> int:
    return zlib.crc32(word.encode(errors="replace"))


def similarity(one: Shingles, other: Shingles) -> float:
    """Jaccard: the shingles that both have, as a part of those that either has."""
    both = len(np.intersect1d(one, other, assume_unique=True))
    return both / max(1, len(one) + len(other) - both)


class _Index:
    """The target rows, to be asked for those that are nearly a given row."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._where: list[str] = []
        self._shingles: list[Shingles] = []
        self._fingerprints: set[int] = set()
        for row in rows:
            self._where.append(row.where)
            self._shingles.append(shingles_of(row))
            self._fingerprints.add(fingerprint(row))
        self._all = np.unique(np.concatenate([*self._shingles, np.zeros(1, np.uint64)]))

    def nearest(self, row: Row) -> tuple[str, float] | None:
        """Where the most similar target row is, and how similar it is; None if none is similar enough, or one is equal."""
        shingles = shingles_of(row)
        places = np.minimum(np.searchsorted(self._all, shingles), len(self._all) - 1)
        if not len(shingles) or (self._all[places] == shingles).sum() < SIMILAR * len(shingles):
            return None
        if fingerprint(row) in self._fingerprints:
            return None
        sketch = self._sketch(shingles)
        proposed = np.array(sorted(self._bands.query(sketch)), np.int64)
        equal = (self._hashes[proposed] == sketch.hashvalues).sum(axis=1)
        compared = proposed[np.argsort(-equal, kind="stable")[:_COMPARED]].tolist()
        alike, best = max(((similarity(shingles, self._shingles[i]), -i) for i in compared), default=(0.0, 0))
        return (self._where[-best], alike) if alike >= SIMILAR else None

    @cached_property
    def _bands(self) -> Any:
        """Made when a row comes to be compared: in most data none does."""
        from datasketch import MinHashLSH

        bands = MinHashLSH(num_perm=PERMUTATIONS, params=(BANDS, PERMUTATIONS // BANDS))
        for number, sketch in enumerate(self._sketches):
            if len(self._shingles[number]):
                bands.insert(number, sketch)
        return bands

    @cached_property
    def _sketches(self) -> list[Any]:
        return [self._sketch(shingles) for shingles in self._shingles]

    @cached_property
    def _hashes(self) -> NDArray[Any]:
        return np.stack([sketch.hashvalues for sketch in self._sketches])

    @cached_property
    def _empty(self) -> Any:
        from datasketch import MinHash

        return MinHash(PERMUTATIONS, hashfunc=int)

    def _sketch(self, shingles: Shingles) -> Any:
        sketch = self._empty.copy()
        sketch.update_batch((shingles & np.uint64(0xFFFFFFFF)).tolist())
        return sketch


def _find(train: Mapping[str, Rows], targets: Mapping[str, Rows]) -> NearDuplicates:
    every = (row for rows in targets.values() for row in rows.read(None))
    index = _Index(row for _, row in sampled(every, MOST_TARGET, 0)[0])
    total = sum(rows.count or 0 for rows in train.values())
    found = NearDuplicates()
    for name, rows in train.items():
        count = rows.count or 0
        chosen = _some(count, total)
        near: list[tuple[str, str, float]] = []
        for row in rows.read(chosen):
            if (other := index.nearest(row)) is not None:
                near.append((row.where, *other))
        found.train[name] = len(near)
        found.looked_at[name] = (count if chosen is None else len(chosen), count)
        if near:
            found.examples[name] = near[:_EXAMPLES]
    return found


def _some(count: int, total: int) -> NDArray[np.int64] | None:
    """Numbers of rows of a source with so many, as many as its part of all that are looked at; None for all."""
    if total <= MOST_TRAINING:
        return None
    drawn = np.random.default_rng(0).choice(count, max(1, count * MOST_TRAINING // total), replace=False)
    return np.sort(drawn)


@cache
def _say_that_nobody_looks() -> None:
    log.info("equal rows are looked for, and near-duplicates are not: pip install 'bilevel[near-duplicates]'")
