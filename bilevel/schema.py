"""The JSON schema of a recipe, by which editors complete keys, check values and show what a setting means."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from bilevel.active import ActiveRule
from bilevel.describe import rules, settings_of, summary_of
from bilevel.errors import InputError
from bilevel.plugins import Plugins
from bilevel.run_settings import RunSettings

DIALECT = "https://json-schema.org/draft/2020-12/schema"
NAMED = ("problems", "solvers", "backends")
"""Kinds of parts of which a recipe names one each, in a section of its own."""
LOGGERS = "loggers"
"""The kind of which the section run names any number, each in short by its name, or with settings."""


class _Generator(GenerateJsonSchema):
    """What only Python can give, such as a function, may be anything."""

    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> JsonSchemaValue:
        """Allow any value."""
        return {}


def schema_text(plugins: Plugins) -> str:
    """The schema as JSON, for everything that is installed. A part that cannot be loaded may have any settings."""
    classes = dict(_classes(plugins))
    inputs: Any = [(key, "validation", TypeAdapter(kind)) for key, kind in classes.items()]
    inputs += [("active", "validation", TypeAdapter(ActiveRule)), ("run", "validation", TypeAdapter(RunSettings))]
    found, shared = TypeAdapter.json_schemas(inputs, schema_generator=_Generator)
    definitions = shared.get("$defs", {})
    for definition in definitions.values():
        if "properties" in definition:
            definition.setdefault("additionalProperties", False)  # as everywhere in a recipe
    for kind in (RunSettings, *rules().values()):
        _explain(definitions[kind.__name__], kind)
    parts: dict[str, Any] = {
        kind: {
            "oneOf": [
                _named(name, _resolved(found[(kind, name), "validation"], definitions), classes.get((kind, name)))
                if (kind, name) in classes
                else _named(name, {}, None)
                for name in sorted(plugins.parts[kind])
            ]
        }
        for kind in (*NAMED, LOGGERS)
    }
    sections = {kind[:-1]: parts[kind] for kind in NAMED}
    definitions["Logger"] = {"anyOf": [{"enum": sorted(plugins.parts[LOGGERS])}, *parts[LOGGERS]["oneOf"]]}
    one = {"$ref": "#/$defs/Logger"}
    settings = definitions["RunSettings"]["properties"]
    about = {key: settings[LOGGERS][key] for key in ("title", "description", "default")}
    settings[LOGGERS] = {**about, "anyOf": [one, {"type": "array", "items": one}]}
    sections |= {name: found[name, "validation"] for name in ("active", "run")}
    schema = {
        "$schema": DIALECT,
        "title": "A recipe of bilevel",
        "type": "object",
        "properties": sections,
        "required": [*(kind[:-1] for kind in NAMED), "run"],
        "$defs": definitions,
    }
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def _classes(plugins: Plugins) -> Iterator[tuple[tuple[str, str], type]]:
    for kind in (*NAMED, LOGGERS):
        for part in plugins.parts[kind].values():
            try:
                cls = part.load()
            except InputError:
                continue
            if dataclasses.is_dataclass(cls):
                yield (kind, part.name), cls  # type: ignore[misc]


def _resolved(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> dict[str, Any]:
    """The schema itself, where it is only a reference to one."""
    reference = schema.get("$ref")
    return dict(definitions[reference.rpartition("/")[2]] if reference else schema)


def _named(name: str, schema: dict[str, Any], cls: type | None) -> dict[str, Any]:
    """The section that names this part."""
    if cls is None:
        return {"type": "object", "properties": {"name": {"const": name}}, "required": ["name"]}
    schema = {**schema, "properties": {"name": {"const": name}, **schema.get("properties", {})}, "title": name}
    schema["required"] = ["name", *schema.get("required", ())]
    schema["additionalProperties"] = False
    _explain(schema, cls)
    return schema


def _explain(schema: dict[str, Any], cls: type) -> None:
    """Say what the class and its settings mean."""
    schema["description"] = summary_of(cls)
    meanings = {setting.name: setting.meaning for setting in settings_of(cls) if setting.meaning}
    schema["properties"] = {
        key: {**value, "description": meanings[key]} if key in meanings else value
        for key, value in schema.get("properties", {}).items()
    }
