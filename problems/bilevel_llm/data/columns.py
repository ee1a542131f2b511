"""Which column of a user's file is which field of a format: what `fields` in a recipe says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bilevel.errors import InputError
from bilevel.suggest import did_you_mean, nearest
from bilevel_llm.data.format import Format
from bilevel_llm.data.registered_formats import Formats, registered_formats
from bilevel_llm.data.wording import names_of_fields


@dataclass(frozen=True)
class Columns:
    """The columns that are read, and what they are.

    format: of the rows, once the columns have the names of its fields.
    names: field of the format -> column of the file.
    roles: field of the format -> what the recipe calls it.
    """

    format: Format
    names: Mapping[str, str]
    roles: Mapping[str, str]

    def pick(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The fields of the format that a row has. Raises `InputError` if it lacks a column that the format needs."""
        fields = {field: row[column] for field, column in self.names.items() if column in row}
        if not self.format.fits(fields):
            raise self._absent(
                next(field for field in self.names if field not in fields), f"{where}: the row has no field", row
            )
        return fields

    def check_seen(self, seen: set[str], path: Path, row: Mapping[str, Any]) -> None:
        """Raise `InputError` for a column that no row of a file has: single rows may lack an optional one.

        seen: the fields that were picked of some row. row: one of them as the file has it.
        """
        for field in self.names:
            if field not in seen:
                raise self._absent(field, f"{path}: no row has a field", row)

    def _absent(self, field: str, beginning: str, row: Mapping[str, Any]) -> InputError:
        column = self.names[field]
        near = nearest(column, row)
        guess = f"; did you mean {near!r}?" if near is not None else ""
        return InputError(
            f"{beginning} {column!r}, which fields.{self.roles[field]} names: there are {names_of_fields(row)}{guess}"
        )


def columns_of(fields: Mapping[str, str] | None, format: str | None, formats: Formats | None = None) -> Columns | None:
    """What `fields` says; None if it says nothing.

    fields: role (see `Format.roles`), or name of a field of the format -> column.
    format: the name of the format; None takes the first registered one that has these roles: a prompt and its response
        are a question and its answer, and not text that goes to the model as it is.
    formats: those that are known; None takes all that plugins have registered.

    Raises `InputError` for a role that there is not, with the nearest, and for roles that make no row.
    """
    if fields is None:
        return None
    known = formats or registered_formats()
    candidates = list(known) if format is None else [known.find(format)]
    for candidate in candidates:
        if set(fields) <= set(_names(candidate)):
            columns = _columns(candidate, fields)
            if columns is not None:
                return columns
    roles = list(dict.fromkeys(name for candidate in candidates for name in _names(candidate)))
    for role in fields:
        if role not in roles:
            of_format = f" of format {format!r}" if format is not None else ""
            raise InputError(f"fields: {role!r} is no role{of_format}{did_you_mean(role, roles)} (role: column)")
    wanted = " or ".join(dict.fromkeys(_needed(candidate) for candidate in candidates))
    given = " and ".join(map(repr, fields)) or "nothing"
    raise InputError(f"fields: {given} does not make a row; name {wanted}")


def _names(format: Format) -> Iterator[str]:
    """What a field of the format may be called: its role first."""
    yield from format.roles
    yield from format.roles.values()
    for names in format.required:
        yield from names


def _columns(format: Format, fields: Mapping[str, str]) -> Columns | None:
    """None if the format needs more. Raises `InputError` for a field that is given twice."""
    roles: dict[str, str] = {}
    for role in fields:
        field = format.roles.get(role, role)
        if field in roles:
            raise InputError(f"fields: {roles[field]!r} and {role!r} are the same field; give one of them")
        roles[field] = role
    if not format.fits(roles):
        return None
    return Columns(format, {field: fields[role] for field, role in roles.items()}, roles)


def _needed(format: Format) -> str:
    """The roles without which the format cannot read a row."""
    roles = {field: role for role, field in format.roles.items()}
    return " and ".join(roles.get(name, name) for name in format.required[0])
