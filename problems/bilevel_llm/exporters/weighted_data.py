"""What an exporter is given: weighted data files, and how their rows are laid out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bilevel.errors import InputError
from bilevel_llm.data.layout import Layout, common_layout, layout_of
from bilevel_llm.data.rows import ROLES, Record, file_type, find_files, read_records
from bilevel_llm.mixing.mix import card_file
from bilevel_llm.reweighting.saved_run import WeightedRun, read_json

Stop = Literal["first", "all"]
"""When a trainer that interleaves stops: when the first source is used up (no row twice), or when all are (rows repeat)."""


@dataclass(frozen=True)
class WeightedSource:
    """A source with a positive weight.

    weight: its share of the rows; the weights of all sources sum to 1.
    files: its data files, absolute, and how many rows each has.
    roles: names of roles in its turns.
    columns: the fields of its layout that occur.
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
        names = {{"directory": "saved", ".parquet": "parquet"}.get(kind, "json") for kind in kinds.values()}
        if len(names) > 1:
            raise InputError(f"source {self.name!r} has files of several types ({', '.join(sorted(names))}); {MAKE_A_MIX}")
        return names.pop()

    def names_of(self, role: str) -> list[str]:
        """What its files call a role ("user", "assistant", "system")."""
        return sorted(name for name in self.roles if ROLES.get(name) == role)


@dataclass(frozen=True)
class WeightedData:
    """Sources by weight; or, where they have been mixed already, one file that stands for all (`mixed`).

    origin: where the weights are from.
    directory: where the exported files will be.
    """

    sources: tuple[WeightedSource, ...]
    origin: str
    directory: Path
    mixed: bool = False
    stop: Stop = "first"
    seed: int = 0

    @property
    def layout(self) -> Layout:
        """The layout that all share. Raises `InputError` if they do not."""
        first = self.sources[0]
        for source in self.sources:
            if source.layout != first.layout:
                raise InputError(
                    f"{first.name!r} has rows of {first.layout}, but {source.name!r} of {source.layout}; {MAKE_A_MIX}"
                )
        return first.layout


MAKE_A_MIX = "`bilevel mix RUN --format messages --output FILE` makes one file of all; then give --mix FILE"

_TEXTS: Mapping[str, tuple[str, ...]] = {
    "alpaca": ("instruction", "input", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}


def data_of_run(run: WeightedRun, directory: Path, *, stop: Stop = "first", seed: int = 0) -> WeightedData:
    """The sources of a run, each row looked at. Raises `InputError` for a source whose rows are not all laid out alike."""
    sources = [
        _read(source.name, run.weights[source.name], find_files(source.patterns), source.format)
        for source in run.problem.sources
        if run.weights[source.name]
    ]
    return WeightedData(tuple(sources), run.origin, directory, stop=stop, seed=seed)


def data_of_mix(file: Path, run: WeightedRun, directory: Path) -> WeightedData:
    """One file that `bilevel mix` wrote, with its card beside it. Raises `InputError` for any other."""
    card = card_file(file)
    if not (file.is_file() and card.is_file()):
        missing = card if file.is_file() else file
        raise InputError(f"{file} is not a mix that `bilevel mix` wrote: there is no {missing}")
    format = read_json(card).get("format")
    return WeightedData((_read(file.name.partition(".")[0], 1.0, [file], format),), run.origin, directory, mixed=True)


def _read(name: str, weight: float, files: Sequence[Path], format: str | None) -> WeightedSource:
    rows: Counter[Path] = Counter()
    roles: set[str] = set()
    columns: dict[str, None] = {}
    first: Record | None = None
    for file in files:
        for record in read_records(file, format):
            first = first or record
            layout = common_layout((first, record))
            fields = [field for field in _fields(layout) if field in record.fields]
            columns.update(dict.fromkeys(fields))
            if layout.field:
                roles.update(_roles(record, fields, layout))
            rows[file.resolve()] += 1
    assert first is not None  # an empty file is an error
    return WeightedSource(name, weight, rows, layout_of(first), frozenset(roles), tuple(columns))


def _fields(layout: Layout) -> tuple[str, ...]:
    return _TEXTS.get(layout.format, (layout.field,))


def _roles(record: Record, fields: Sequence[str], layout: Layout) -> set[str]:
    turns = [turn for field in fields for turn in record.fields[field]]
    if any(layout.role not in turn or layout.text not in turn for turn in turns):
        raise InputError(f"{record.where}: not every turn has {layout.role!r} and {layout.text!r}; {MAKE_A_MIX}")
    return {turn[layout.role] for turn in turns}
