"""The records of a run, kept compactly: a number takes eight bytes, and its name is kept once."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, overload

from bilevel.record import Record, Records, Steps


class _Layout(NamedTuple):
    """The names of a record's numbers, in the order in which they are kept."""

    upper: tuple[str, ...]
    metrics: tuple[str, ...]
    parts: tuple[tuple[str, tuple[str, ...]], ...]
    average: tuple[str, ...]


class History(Records):
    """One record a step. A record is put together when it is asked for; a slice is a view.

    As dictionaries, the records of 100,000 steps with 50 sources would take more than a gigabyte.
    """

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self._numbers = array("d")  # of all records, one after another: first `step` and so on, then those of the layout
        self._starts = array("q")
        self._layout_of, self._active_of = array("q"), array("q")  # of each record, a place in the lists below
        self._layouts: dict[_Layout, int] = {}
        self._actives: dict[tuple[str, ...], int] = {}
        self._layout_list: list[_Layout] = []
        self._active_list: list[list[str]] = []
        for record in records:
            self.append(record)

    def append(self, record: Record) -> None:
        """Add the record of a step. Its numbers are kept as floats."""
        layout = _Layout(
            tuple(record.upper),
            tuple(record.metrics),
            tuple((key, tuple(part)) for key, part in record.parts.items()),
            tuple(record.average),
        )
        if layout not in self._layouts:
            self._layouts[layout] = len(self._layout_list)
            self._layout_list.append(layout)
        active = tuple(record.active)
        if active not in self._actives:
            self._actives[active] = len(self._active_list)
            self._active_list.append(list(active))
        numbers = array("d", (record.step, record.seconds, record.moved, record.optimizer_bytes, record.size))
        for named in (record.upper, record.metrics, *record.parts.values(), record.average):
            numbers.extend(named.values())
        self._starts.append(len(self._numbers))
        self._layout_of.append(self._layouts[layout])
        self._active_of.append(self._actives[active])
        self._numbers.extend(numbers)

    def __len__(self) -> int:
        """The number of steps."""
        return len(self._starts)

    @overload
    def __getitem__(self, place: int) -> Record: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[Record]: ...

    def __getitem__(self, place: int | slice) -> Record | Sequence[Record]:
        """The record of a step, or a view of several."""
        if isinstance(place, slice):
            return Steps(self, range(*place.indices(len(self))))
        at = range(len(self))[place]
        layout = self._layout_list[self._layout_of[at]]
        end = self._starts[at + 1] if at + 1 < len(self) else len(self._numbers)
        step, seconds, moved, optimizer_bytes, size, *numbers = self._numbers[self._starts[at] : end]
        values = iter(numbers)

        def named(names: tuple[str, ...]) -> Mapping[str, float]:
            return dict(zip(names, values, strict=False))  # takes as many as there are names

        return Record(
            step=int(step),
            seconds=seconds,
            upper=named(layout.upper),
            moved=bool(moved),
            metrics=named(layout.metrics),
            parts={key: named(names) for key, names in layout.parts},
            average=named(layout.average),
            active=self._active_list[self._active_of[at]],
            optimizer_bytes=int(optimizer_bytes),
            size=int(size),
        )
