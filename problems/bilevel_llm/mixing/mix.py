"""A mixed data set that has been decided on: what it is, as a table and a card, and how it is written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator
from rich.console import Group
from rich.table import Table
from rich.text import Text

from bilevel.data import generator
from bilevel.documents import read_json
from bilevel.errors import DamagedError, InputError
from bilevel.files import leftovers, named, remove_leftovers, write_through, written_whole
from bilevel.lock import owned
from bilevel_llm.data.format import Format
from bilevel_llm.data.layout import Layout
from bilevel_llm.data.reading import RawRow
from bilevel_llm.data.registered_formats import registered_formats
from bilevel_llm.data.rows import PROVENANCE
from bilevel_llm.data.settings import DataSet
from bilevel_llm.mixing.gather import gather
from bilevel_llm.mixing.pool import Pool
from bilevel_llm.mixing.quotas import Counts, Weights
from bilevel_llm.mixing.row_files import check_output, write_rows
from bilevel_llm.mixing.spool import Spool

_ORDER = 1002  # of the rows in the mix; see `pool._DRAW`

OnShortfall = Literal["error", "report", "redistribute"]
"""What to do where a source has too few rows: refuse; make a smaller mix; or fill up from the other sources."""

AS_THEY_ARE = "source"
"""Stands for a format where one is asked for: each row is written as its file has it."""


def writing_format(name: str) -> Format | None:
    """The format that rows are written in; None for `AS_THEY_ARE`. Raises `InputError` for an unknown one."""
    if name == AS_THEY_ARE:
        return None
    try:
        return registered_formats().find(name)
    except InputError as error:
        raise InputError(f"{error}; or {AS_THEY_ARE}, which leaves rows as they are") from error


def _check_format(name: str) -> str:
    try:
        writing_format(name)
    except InputError as error:
        raise ValueError(str(error)) from error
    return name


MixFormat = Annotated[str, AfterValidator(_check_format)]
"""`AS_THEY_ARE`, or the name of the format that all rows are written in."""


@dataclass(frozen=True, eq=False)
class Mix:
    """Which rows, how often, and in which order. Made by `make_mix`.

    pools: the sources, in the order of the recipe.
    data: how the rows of each are read.
    weights: their shares. Shape: (sources,).
    quotas: rows that the weights ask of each. Shape: (sources,).
    counts: rows that each gives; different from the quotas where one has too few. Shape: (sources,).
    format: the format that all rows are written in; None writes them as they are.
    layout: how a written row is laid out.
    """

    pools: Sequence[Pool]
    data: Sequence[DataSet]
    weights: Weights
    quotas: Counts
    counts: Counts
    format: Format | None
    layout: Layout
    seed: int
    max_repeats: int
    on_shortfall: OnShortfall

    @property
    def rows(self) -> int:
        """Rows of the mix."""
        return int(self.counts.sum())

    @cached_property
    def tokens(self) -> list[int]:
        """Tokens from each source, counted as the reweighting run does."""
        return [pool.tokens(int(count)) for pool, count in zip(self.pools, self.counts, strict=True)]

    @property
    def repeats(self) -> list[float]:
        """How often the rows of each source are used, on average: 0.5 for half of them, 2 for all of them twice."""
        return [int(n) / max(1, len(pool.rows)) for pool, n in zip(self.pools, self.counts, strict=True)]

    @cached_property
    def sequence(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """For every row of the mix, in order: its source, its row in that source's table, and which copy it is, from 1."""
        rows, copies = zip(*(pool.draw(int(n)) for pool, n in zip(self.pools, self.counts, strict=True)), strict=True)
        order = generator(self.seed, _ORDER).permutation(self.rows)
        source = np.repeat(np.arange(len(self.pools)), self.counts)
        return source[order], np.concatenate(rows)[order], np.concatenate(copies)[order]

    def write(self, path: Path, facts: Mapping[str, Any] | None = None) -> None:
        """Write the rows to `path` (.jsonl or .parquet) and the card to `card_file(path)`.

        facts: more to say in the card.

        Raises `InputError` if one of the two exists, for an unknown ending, and if such a file cannot hold the rows.
        """
        with claimed(path):
            tables = [pool.table for pool in self.pools]
            sources, rows, copies = self.sequence
            starts = np.cumsum([0, *map(len, tables)])[:-1]
            needed, slots = np.unique(starts[sources] + rows, return_inverse=True)
            with named(path), Spool(path.parent, len(needed)) as spool:
                gather(tables, self.data, needed, self._written, spool)

                def walk() -> Iterator[dict[str, Any]]:
                    for slot, source, row, copy in zip(slots, sources, rows, copies, strict=True):
                        yield {**spool.get(slot), PROVENANCE: self._provenance(int(source), int(row), int(copy))}

                with written_whole(card_file(path)) as card, written_whole(path) as part:
                    write_rows(part, path.suffix, walk)
                    about = {**self.card(), **(facts or {}), "file": {"name": path.name, "sha256": sha256_of(part)}}
                    # on the disk before the rows get their name, so that rows without a card can be known as ours
                    write_through(write_card(card, about))
                    check_output(path, card_file(path))  # another program may have been quicker

    def card(self) -> dict[str, Any]:
        """What was drawn from what."""
        sources = {
            pool.name: {
                "weight": float(self.weights[i]),
                "available": len(pool.rows),
                "withheld": pool.withheld,
                "quota": int(self.quotas[i]),
                "rows": int(self.counts[i]),
                "repeats": self.repeats[i],
                "tokens": self.tokens[i],
                "hash": pool.table.content_hash,
                "files": [str(file) for file in pool.table.files],
            }
            for i, pool in enumerate(self.pools)
        }
        return {
            "rows": self.rows,
            "tokens": sum(self.tokens),
            "format": self.layout.format,  # for those who read the rows
            "seed": self.seed,
            "max_repeats": self.max_repeats,
            "on_shortfall": self.on_shortfall,
            "sources": sources,
            "notes": self.notes(),
            "departures": self.departures(),
            "versions": {"bilevel": version("bilevel")},
        }

    def notes(self) -> list[str]:
        """What a user should know before using the mix."""
        return [*self.of_sources(), *self.departures()]

    def of_sources(self) -> list[str]:
        """What is so of the sources, whatever the weights are."""
        notes = [
            f"rows of {pool.name!r} that also occur in the validation data, and are left out: {pool.withheld:,}"
            for pool in self.pools
            if pool.withheld
        ]
        notes += [
            f"{pool.name!r} is a sample of {pool.table.sampled_from:,} rows (max_rows)"
            for pool in self.pools
            if pool.table.sampled_from is not None
        ]
        return notes

    def departures(self) -> list[str]:
        """Where the mix is not what the weights ask for."""
        notes = []
        for pool, quota, count in zip(self.pools, self.quotas, self.counts, strict=True):
            if count < quota:
                limit = f"it has {len(pool.rows):,}, used at most {self.max_repeats} times each"
                notes.append(f"{pool.name!r} gives {count:,} rows, {quota - count:,} fewer than its weight asks: {limit}")
            elif count > quota:
                notes.append(f"{pool.name!r} gives {count:,} rows, {count - quota:,} of them in place of other sources")
        return notes

    def table(self) -> Group:
        """The mix for a person, with its notes below."""
        table = Table(box=None, header_style="bold", pad_edge=False)
        table.add_column("source")
        for column in ("weight", "rows available", "rows drawn", "repeats", "tokens"):
            table.add_column(column, justify="right")
        for i, pool in enumerate(self.pools):
            counts = (f"{len(pool.rows):,}", f"{self.counts[i]:,}", f"{self.repeats[i]:.2f}", f"{self.tokens[i]:,}")
            table.add_row(pool.name, f"{self.weights[i]:.3f}", *counts)
        available = sum(len(pool.rows) for pool in self.pools)
        table.add_row("all", "", f"{available:,}", f"{self.rows:,}", "", f"{sum(self.tokens):,}")
        return Group(table, *(Text(f"- {note}") for note in self.notes()))

    def _written(self, row: RawRow) -> Mapping[str, Any]:
        if self.format is not None:
            return self.format.write(row.row())
        if row.layout != self.layout:
            raise InputError(
                f"{row.where}: the row is {row.layout}, unlike the first one ({self.layout}); use --format messages"
            )
        return {name: value for name, value in row.fields.items() if name != PROVENANCE}  # an earlier mix has it

    def _provenance(self, source: int, row: int, copy: int) -> dict[str, Any]:
        table = self.pools[source].table
        file, number = str(table.files[table.file[row]]), int(table.number[row])
        said = {"source": self.pools[source].name, "file": file, "row": number, "repeat": copy}
        return {**said, "format": self.layout.format}


@contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Be the only one who writes this mix. What a writer that was killed has left is removed; nothing else is.

    Raises `InputError` if the mix or its card exists, or if another process is writing them.
    """
    if not _half_written(path):
        check_output(path, card_file(path))
    with owned(path, file=True):
        if _half_written(path):
            path.unlink()
        remove_leftovers(path.parent, path.name, card_file(path).name)
        check_output(path, card_file(path))
        yield


def _half_written(path: Path) -> bool:
    """Whether rows are there without their card, and a card that was about to follow them is about just these rows."""
    if not path.is_file() or card_file(path).exists():
        return False
    return any(_is_about(card, path) for card in leftovers(path.parent, card_file(path).name))


def _is_about(card: Path, path: Path) -> bool:
    try:
        return read_json(card, Card).file.sha256 == sha256_of(path)
    except DamagedError:
        return False


@dataclass(frozen=True)
class DrawnSource:
    """What others need to know of a source of a mix: its weight, and the hash of its data."""

    weight: float
    hash: str


@dataclass(frozen=True)
class MixedFile:
    """The rows that a card is about."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Card:
    """What others need to know of a mix; its card says more."""

    file: MixedFile
    sources: Mapping[str, DrawnSource]
    format: str | None = None


def read_card(path: Path) -> Card:
    """The card of a mix. Raises `DamagedError`, naming the key, if it is not one."""
    return read_json(card_file(path), Card)


def write_card(file: Path, content: Mapping[str, Any]) -> Path:
    """Write a card. Returns its file."""
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return file


def card_file(path: Path) -> Path:
    """Where the card of a mix is: beside it."""
    return path.with_name(f"{path.name}.json")


def sha256_of(path: Path) -> str:
    """The hash of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
