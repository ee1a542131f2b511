"""Short forms of data sets in a recipe: a path, a list of paths, or names with what they stand for.

    sources: {web: data/web.jsonl, books: {path: data/books.parquet, format: alpaca}}
    validation: data/target.jsonl

The objects that are built, and so the resolved recipe, have the long form: a list of mappings with a `path` and a `name`.
"""

from __future__ import annotations

import glob
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, TypeAdapter
from pydantic_core import CoreSchema, core_schema

from bilevel_llm.data.settings import DataFiles, DataSet


class ShortForm:
    """An annotation of a list of data sets, which may then be written in short.

    kind: what the list holds.
    one: what to write in place of a single path, where each set needs a name; None: one path is one set.
    """

    def __init__(self, kind: type[DataSet], one: str | None = None) -> None:
        self._kind, self._one = kind, one

    def long(self, given: Any) -> Any:
        """The long form: a mapping of names to settings, or a list of settings. What is neither is left as it is.

        Raises `ValueError` for a short form that does not say enough, and for a name that is given twice.
        """
        alone = isinstance(given, str) or (isinstance(given, Mapping) and "path" in given)
        if alone and self._one is not None:
            raise ValueError(f"each needs a name; write {self._one}")
        if isinstance(given, str):
            return [{"path": given}]
        if alone:
            return [given]
        if isinstance(given, Mapping):
            return {name: self._named(str(name), settings) for name, settings in given.items()}
        if isinstance(given, list):
            return [{"name": name_of(one), "path": one} if isinstance(one, str) else one for one in given]
        return given

    def _named(self, name: str, settings: Any) -> Any:
        if isinstance(settings, self._kind):
            return settings
        if not isinstance(settings, Mapping):
            return {"name": name, "path": settings}
        if settings.get("name", name) != name:
            raise ValueError(f"{name} has another name inside, {settings['name']!r}; leave that out")
        return {"name": name, **settings}

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        by_name = TypeAdapter(dict[str, self._kind])  # type: ignore[name-defined]  # which pydantic reads, not mypy

        def read(given: Any, build: core_schema.ValidatorFunctionWrapHandler) -> Any:
            long = self.long(given)
            return list(by_name.validate_python(long).values()) if isinstance(long, dict) else build(long)

        return core_schema.no_info_wrap_validator_function(read, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        path = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
        entry = {"anyOf": [*path["anyOf"], {"type": "object"}]}
        return {"anyOf": [handler(schema), *path["anyOf"], {"type": "object", "additionalProperties": entry}]}


class PathOrPaths:
    """An annotation of a list of paths or data files, which may then be a single one."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def listed(given: Any) -> Any:
            return [given] if isinstance(given, str | Mapping | DataFiles) else given

        return core_schema.no_info_before_validator_function(listed, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [handler(schema), {"type": "string"}, {"type": "object"}]}


def name_of(path: str) -> str:
    """What a set is called that is only a path: its last part without an ending, and without wildcards."""
    parts = [part for part in PurePath(path).parts if not glob.has_magic(part)]
    return (parts[-1].partition(".")[0] if parts else "") or path
