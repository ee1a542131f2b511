"""Axolotl: the key `datasets` of its configuration.

Its data sets have no weights, probabilities or numbers of rows (`shards` keeps one N-th of a source): what is exported is
the mix that was drawn.
"""

from typing import Any

import yaml
from packaging.version import Version

from bilevel.errors import InputError
from bilevel_llm.data.layout import ChatLayout, InstructionLayout, TextLayout
from bilevel_llm.exporters.exporter import SHARES, Exporter
from bilevel_llm.exporters.weighted_data import MAKE_A_MIX, WeightedData, WeightedSource

_OWN_NAMES = {"user": {"human", "user"}, "assistant": {"gpt", "assistant"}, "system": {"system"}}


class Axolotl(Exporter):
    """The key `datasets` of a configuration of axolotl."""

    package = "axolotl"
    versions = ">=0.17,<0.20"
    checked = "0.19.0"

    def export(self, data: WeightedData, version: Version) -> dict[str, str]:
        """One YAML file. See `Exporter.export`."""
        if data.mix is None:
            raise InputError(f"axolotl has no weights for data sets; {MAKE_A_MIX}")
        (source,) = data.sources
        (file,) = source.files
        entry = {"path": str(file), "ds_type": source.kind, **_type(source)}
        header = (
            f"# weights: {data.run.origin}\n{SHARES}# rows that repeat are meant to: leave dataset_exact_deduplication off\n"
        )
        listed = yaml.safe_dump({"datasets": [entry]}, sort_keys=False, allow_unicode=True, width=1000)
        return {"datasets.yaml": header + listed}


def _type(source: WeightedSource) -> dict[str, Any]:
    """How axolotl is told what a row is."""
    match source.layout:
        case InstructionLayout(instruction="instruction", output="output", input=None | "input"):
            return {"type": "alpaca"}
        case TextLayout(field=field):
            return {"type": "completion", "field": field}
        case ChatLayout(fields=(field,), role=role, text=text):
            described: dict[str, Any] = {"type": "chat_template", "field_messages": field}
            if role != "role":
                described["message_property_mappings"] = {"role": role, "content": text}
            names = {role: source.names_of(role) for role in _OWN_NAMES}
            if any(not set(names[role]) <= own for role, own in _OWN_NAMES.items()):
                described["roles"] = {role: found for role, found in names.items() if found}
            return described
        case layout:
            raise InputError(
                f"source {source.name!r}: axolotl has no data set type for rows of {layout}; there is no faithful export"
            )
