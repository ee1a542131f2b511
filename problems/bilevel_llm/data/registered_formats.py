"""The formats that plugins have registered: found by name, or by the fields of a row."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Annotated, Any

from pydantic import AfterValidator

from bilevel.errors import InputError
from bilevel.plugins import Plugins, load_plugins
from bilevel.suggest import did_you_mean
from bilevel_llm.data.format import Format
from bilevel_llm.data.rows import PROVENANCE
from bilevel_llm.data.wording import names_of_fields


class Formats:
    """Some formats, among which a row's is looked for.

    formats: no two of one name.
    """

    def __init__(self, formats: Iterable[Format]) -> None:
        self._by_name = {format.name: format for format in formats}

    def __iter__(self) -> Iterator[Format]:
        """They themselves, in the order of their registration."""
        return iter(self._by_name.values())

    @property
    def names(self) -> list[str]:
        """Their names."""
        return list(self._by_name)

    def find(self, name: str) -> Format:
        """The format of that name. Raises `InputError` naming the nearest known one."""
        if name not in self._by_name:
            raise InputError(f"unknown format {name!r}{did_you_mean(name, self.names)}")
        return self._by_name[name]

    def detect(self, fields: Mapping[str, Any], where: str) -> Format:
        """The format that a mixed row says it is in; otherwise the one that most speaks for (see `Evidence`).

        where: the row's file and line, for messages.

        Raises `InputError` if nothing speaks for any, and if as much speaks for several.
        """
        origin = fields.get(PROVENANCE)
        if isinstance(origin, dict) and (said := self._by_name.get(str(origin.get("format")))) and said.fits(fields):
            return said
        evidence = {name: format.detect(fields) for name, format in self._by_name.items()}
        most = max(evidence.values(), default=0)
        if most <= 0:
            has = names_of_fields(fields)
            raise InputError(f"{where}: the row is in no known format: it has {has}{self._closest(fields)}")
        best = [name for name, found in evidence.items() if found == most]
        if len(best) > 1:
            raise InputError(
                f"{where}: the row may be in format {' or '.join(map(repr, best))}: it has {names_of_fields(fields)}; "
                f"say which it is, as in format: {best[0]}"
            )
        return self._by_name[best[0]]

    def misfit(self, format: Format, fields: Mapping[str, Any], where: str) -> InputError:
        """What is wrong with a row that lacks fields which the format needs, and what to do."""
        if len(format.required) == 1:
            missing = " and ".join(repr(name) for name in format.required[0] if name not in fields)
        else:
            missing = " or ".join(repr(names[0]) for names in format.required)
        return InputError(
            f"{where}: the row has no {missing}, which format {format.name!r} needs: it has {names_of_fields(fields)}"
            f"{self._closest(fields)}"
        )

    def identity(self, name: str | None) -> list[str]:
        """What decides how rows are read: to be part of the key of whatever is kept of them.

        name: the format; None if it is detected, which is up to all of them.
        """
        formats = self._by_name.values() if name is None else [self.find(name)]
        return sorted(f"{type(f).__module__}:{type(f).__qualname__} {f.version}" for f in formats)

    def _closest(self, fields: Mapping[str, Any]) -> str:
        """What to do about a row that does not fit: the format whose fields it comes closest to."""

        def likeness(format: Format) -> float:
            return max(sum(map(presence, names)) / len(names) for names in format.required)

        def presence(name: str) -> float:
            """1 where the row has the field, and a part of that where it has one of a similar name."""
            return max((difflib.SequenceMatcher(None, name, own).ratio() for own in fields), default=0)

        best = max(self._by_name.values(), key=lambda format: (format.detect(fields), likeness(format)))
        if best.fits(fields):
            return f"; it fits format {best.name!r}: set format: {best.name}"
        needs = " or ".join(" and ".join(names) for names in best.required)
        return f"; the nearest format is {best.name!r}: rename the row's fields to {needs}"


def formats_of(plugins: Plugins) -> Formats:
    """The formats that these plugins register. Raises `InputError` for one that cannot be used."""
    formats = []
    for part in plugins.parts["formats"].values():
        kind = part.load()
        if not (isinstance(kind, type) and issubclass(kind, Format)) or getattr(kind, "name", None) != part.name:
            raise InputError(
                f"the format {part.name!r} (plugin {part.plugin!r}): {part.target} must be a subclass of "
                f"bilevel_llm.data.format.Format with the name {part.name!r}"
            )
        formats.append(kind())
    return Formats(formats)


@cache
def registered_formats() -> Formats:
    """The formats of the installed plugins, which are looked for once."""
    return formats_of(load_plugins())


def _check_name(name: str) -> str:
    try:
        registered_formats().find(name)
    except InputError as error:
        raise ValueError(str(error)) from error  # to which pydantic adds the key and the line
    return name


FormatName = Annotated[str, AfterValidator(_check_name)]
"""The name of a registered format, in a recipe."""
