"""Axolotl: the key `datasets` of its configuration.

Up to 0.19 its data sets have no weights, probabilities or numbers of rows (`shards` keeps one N-th of a source): what is
exported is the mix that was drawn. Its repository has since merged a `weight` (pull request 3690): the part of a data set
that is kept, drawn at random, above 0 and at most 1. That is no share of the mixture: the shares w_i of sources with n_i
rows come from parts c * w_i / n_i, where c makes the largest of them 1, so that no row is used twice.
"""

from typing import Any

import yaml
from packaging.version import Version

from bilevel.errors import InputError
from bilevel_llm.data.layout import ChatLayout, InstructionLayout, TextLayout
from bilevel_llm.exporters.exporter import SHARES, Exporter
from bilevel_llm.exporters.weighted_data import MAKE_A_MIX, WeightedData, WeightedSource

_WEIGHTS_SINCE = Version("0.20")
"""The release after the newest one, which has none. It is not out, so what is written for it was never read by it."""
_OWN_NAMES = {"user": {"human", "user"}, "assistant": {"gpt", "assistant"}, "system": {"system"}}


class Axolotl(Exporter):
    """The key `datasets` of a configuration of axolotl."""

    package = "axolotl"
    versions = ">=0.17,<0.21"
    checked = "0.19.0"

    def export(self, data: WeightedData, version: Version) -> dict[str, str]:
        """One YAML file. See `Exporter.export`."""
        if data.mix is None and version < _WEIGHTS_SINCE:
            raise InputError(f"axolotl before {_WEIGHTS_SINCE} has no weights for data sets; {MAKE_A_MIX}")
        header = f"# weights: {data.run.origin}\n{SHARES}"
        if data.mix is None:
            entries = _parts(data)
            header += "# weight: the part of a data set that is kept; together, the parts make the learned shares of rows\n"
        else:
            entries = [entry for source in data.sources for entry in _entries(source)]
            header += "# rows that repeat are meant to: leave dataset_exact_deduplication off\n"
        listed = yaml.safe_dump({"datasets": entries}, sort_keys=False, allow_unicode=True, width=1000)
        return {"datasets.yaml": header + listed}


def _parts(data: WeightedData) -> list[dict[str, Any]]:
    """The data sets, each with the part of it that is kept."""
    if data.stop == "all":
        raise InputError(
            "axolotl keeps a part of each data set and repeats no row, so --stop all cannot be had; draw a mix with repeats "
            "instead"
        )
    wanted = {source.name: source.weight / sum(source.files.values()) for source in data.sources}
    scale = max(wanted.values())
    return [{**entry, "weight": wanted[source.name] / scale} for source in data.sources for entry in _entries(source)]


def _entries(source: WeightedSource) -> list[dict[str, Any]]:
    """One data set for each file."""
    return [{"path": str(file), "ds_type": source.kind, **_type(source)} for file in source.files]


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
