"""What an exporter is given: weighted data files, and how their rows are laid out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from bilevel.errors import InputError
from bilevel_llm.data.columns import columns_of
from bilevel_llm.data.files import file_type
from bilevel_llm.data.layout import ChatLayout, Layout
from bilevel_llm.data.reading import RawRow, common_layout, read_raw_rows
from bilevel_llm.data.settings import DataFiles, DataSet
from bilevel_llm.mixing.draw import MAX_REPEATS
from bilevel_llm.mixing.mix import card_file, read_card, sha256_of
from bilevel_llm.reweighting.saved_run import WeightedRun

Stop = Literal["first", "all"]
"""When a trainer that interleaves stops: when the first source is used up (no row twice), or when all are (rows repeat)."""


@dataclass(frozen=True)
class WeightedSource:
    """A source with a positive weight.

    weight: its share of the rows; the weights of all sources sum to 1.
    files: its data files, absolute, and how many rows each has.
    roles: names of roles in its turns; none if rows are not lists of turns.
    columns: the fields of its layout (`Layout.columns`) that occur.
    """

    name: str
    weight: float
    files: Mapping[Path, int]
    layout: Layout
    roles: frozenset[str]
    columns: tuple[str, ...]

    @property
    def kind(self) -> str:
        """How `datasets` calls the type of its files: "json", "parquet" or "saved". Raises `InputError` for several."""
        kinds = {file: file_type(file) for file in self.files}
        if csv := [file.name for file, kind in kinds.items() if kind.startswith(".csv")]:
            raise InputError(f"source {self.name!r}: trainers would guess the types of the cells of {csv[0]}; {MAKE_A_MIX}")
        names = {{"directory": "saved", ".parquet": "parquet", ".arrow": "arrow"}.get(k, "json") for k in kinds.values()}
        if len(names) > 1:
            raise InputError(f"source {self.name!r} has files of several types ({', '.join(sorted(names))}); {MAKE_A_MIX}")
        return names.pop()

    def names_of(self, role: str) -> list[str]:
        """What its files call a role ("user", "assistant", "system")."""
        known = self.layout.roles if isinstance(self.layout, ChatLayout) else {}
        return sorted(name for name in self.roles if known.get(name) == role)


@dataclass(frozen=True)
class WeightedData:
    """The sources of a run by weight; or, where they have been mixed already, one file that stands for all of them.

    run: where the weights are from.
    directory: where the exported files will be.
    mix: the file that `bilevel mix` wrote; None without one.
    stop, seed: of the interleaving.
    allow_changed_data: read the data even if it is not what the weights were learned on.
    """

    run: WeightedRun
    directory: Path
    mix: Path | None = None
    stop: Stop = "first"
    seed: int = 0
    allow_changed_data: bool = False

    @property
    def weights(self) -> Mapping[str, float]:
        """The weights of all sources, those of weight 0 included."""
        return self.run.weights

    @cached_property
    def sources(self) -> tuple[WeightedSource, ...]:
        """The sources with a positive weight, or the mix as the only one. Asked for the first time, it reads every row.

        Raises `InputError` for changed data, for a source whose rows are not all laid out alike, and for a mix that
        `bilevel mix` has not drawn by the weights of this run.
        """
        if not self.allow_changed_data:
            self.run.check_data()
        if self.mix is not None:
            return (_read_mix(self.mix, self.run),)
        return tuple(
            _read(source.name, self.weights[source.name], source)
            for source in self.run.problem.sources
            if self.weights[source.name]
        )

    @property
    def layout(self) -> Layout:
        """The layout that all share. Raises `InputError` if they do not."""
        first = self.sources[0]
        for source in self.sources:
            if source.layout != first.layout:
                one, other = str(first.layout), str(source.layout)
                if one == other:
                    one, other = (f"{one} in {' and '.join(found.columns)}" for found in (first, source))
                raise InputError(f"{first.name!r} has rows of {one}, but {source.name!r} of {other}; {MAKE_A_MIX}")
        return first.layout

    def interleaving_note(self) -> str | None:
        """What a trainer that interleaves the sources by their weights would do to them, if it is not what a user expects.

        Such a trainer stops when the first source is used up, however much is left of the others; or it repeats the small
        ones until the last is used up. It is worth a word where a tenth of all rows is lost, or rows are used more often
        than `bilevel mix` uses them by default.
        """
        rows = {source.name: sum(source.files.values()) for source in self.sources}
        draws = {source.name: rows[source.name] / source.weight for source in self.sources}
        first, total = min(draws, key=lambda name: draws[name]), sum(rows.values())
        if self.stop == "first" and draws[first] < 0.9 * total:
            return (
                f"the interleaved data end after about {draws[first]:,.0f} of {total:,} rows, when {first!r} is used up "
                f"({rows[first]:,} rows, weight {self.weights[first]:.3f}); `bilevel mix` draws as many as you like"
            )
        repeats = max(draws.values()) / draws[first]
        if self.stop == "all" and repeats > MAX_REPEATS:
            return (
                f"the interleaved data repeat the rows of {first!r} about {repeats:,.0f} times, until the last source is "
                "used up; `bilevel mix` bounds repeats (--max-repeats)"
            )
        return None


MAKE_A_MIX = "`bilevel mix RUN --format messages --output FILE` makes one file of all; then give --mix FILE"


def _read_mix(file: Path, run: WeightedRun) -> WeightedSource:
    """A file that `bilevel mix` drew by the weights of the run, by the card beside it."""
    if not (file.is_file() and card_file(file).is_file()):
        missing = card_file(file) if file.is_file() else file
        raise InputError(f"{file} is not a mix that `bilevel mix` wrote: there is no {missing}")
    card = read_card(file)
    if card.file.sha256 != sha256_of(file):
        raise InputError(f"{file} has changed since `bilevel mix` wrote it: its hash is not the one in {card_file(file)}")
    drawn = {name: source.weight for name, source in card.sources.items()}
    if drawn.keys() != run.weights.keys():
        raise InputError(f"{file} is a mix of {_names(drawn)}, but the sources of {run.directory} are {_names(run.weights)}")
    for name, weight in run.weights.items():
        if not math.isclose(drawn[name], weight, rel_tol=1e-6, abs_tol=1e-9):
            raise InputError(
                f"{file} was drawn by other weights ({name!r}: {drawn[name]:.4f}, and {weight:.4f} in {run.origin}); draw a "
                "mix from this run, or name the run and the --weights that the mix was drawn by"
            )
        known = run.hashes.get(name)
        if known is not None and card.sources[name].hash != known:
            raise InputError(f"{file} was drawn from other data: the hash of {name!r} is not that in {run.directory}")
    return _read(file.name.partition(".")[0], 1.0, DataFiles(str(file), format=card.format))


def _names(weights: Mapping[str, float]) -> str:
    return ", ".join(map(repr, weights))


def _read(name: str, weight: float, data: DataSet) -> WeightedSource:
    rows: Counter[Path] = Counter()
    roles: set[str] = set()
    columns: dict[str, None] = {}
    first: RawRow | None = None
    for file in data.files():
        path = file.resolve()
        for row in read_raw_rows(file, data.format, fields=data.fields):
            first = first or row
            layout = common_layout((first, row))
            _check_layout_says_all(row, layout)
            columns.update(dict.fromkeys(column for column in layout.columns if column in row.fields))
            if isinstance(layout, ChatLayout):
                roles.update(_roles(row, layout))
            rows[path] += 1
    assert first is not None  # an empty file is an error
    names = columns_of(data.fields, data.format)
    if names is None:
        return WeightedSource(name, weight, rows, first.layout, frozenset(roles), tuple(columns))
    layout = first.layout.renamed(names.names)
    return WeightedSource(name, weight, rows, layout, frozenset(roles), tuple(names.names[column] for column in columns))


def _check_layout_says_all(row: RawRow, layout: Layout) -> None:
    """Raises `InputError` for a row of which a trainer that is told its layout would learn something else."""
    turns = row.row().turns
    prompted = isinstance(layout, ChatLayout) and len(layout.fields) > 1  # trainers do not learn the answers of a prompt
    if any(turn.reasoning or (turn.masked and not prompted) for turn in turns):
        raise InputError(
            f"{row.where}: the row has answers with reasoning, or some that are not to be learned, which trainers cannot be "
            "told; there is no faithful export"
        )
    told: dict[str, Any] = {name: row.fields[name] for name in layout.columns if name in row.fields}
    if isinstance(layout, ChatLayout):
        entries = [turn for field in layout.fields for turn in told[field]]
        if not all(isinstance(turn, dict) and isinstance(turn.get(layout.text), str) for turn in entries):
            raise InputError(f"{row.where}: not every turn has {layout.role!r} and {layout.text!r}, a string; {MAKE_A_MIX}")
    if layout.columns and row.format.read(told, row.where) != turns:
        raise InputError(
            f"{row.where}: the row says more than its {' and '.join(told)}, and trainers would be told of these alone; "
            f"{MAKE_A_MIX}"
        )


def _roles(row: RawRow, layout: ChatLayout) -> set[str]:
    return {turn[layout.role] for field in layout.fields for turn in row.fields[field]}
