"""Axolotl: the key `datasets` of its configuration.

Its data sets have no weights, probabilities or numbers of rows (`shards` keeps one N-th of a source): what is exported is
the mix that was drawn.
"""

from typing import Any

import yaml

from bilevel.errors import InputError
from bilevel_llm.exporters.weighted_data import MAKE_A_MIX, WeightedData, WeightedSource

_OWN_NAMES = {"user": {"human", "user"}, "assistant": {"gpt", "assistant"}, "system": {"system"}}


def export(data: WeightedData) -> dict[str, str]:
    """One YAML file."""
    if not data.mixed:
        raise InputError(f"axolotl has no weights for data sets; {MAKE_A_MIX}")
    (source,) = data.sources
    (file,) = source.files
    entry = {"path": str(file), "ds_type": source.kind, **_type(source)}
    header = f"# weights: {data.origin}\n# rows that repeat are meant to: leave dataset_exact_deduplication off\n"
    return {"datasets.yaml": header + yaml.safe_dump({"datasets": [entry]}, sort_keys=False, allow_unicode=True, width=1000)}


def _type(source: WeightedSource) -> dict[str, Any]:
    layout = source.layout
    if layout.format == "alpaca":
        return {"type": "alpaca"}
    if layout.format == "text":
        return {"type": "completion", "field": "text"}
    if layout.format == "prompt_completion":
        raise InputError("axolotl has no data set type for rows of prompt and completion; there is no faithful export")
    described: dict[str, Any] = {"type": "chat_template", "field_messages": layout.field}
    if layout.role != "role":
        described["message_property_mappings"] = {"role": layout.role, "content": layout.text}
    names = {role: source.names_of(role) for role in _OWN_NAMES}
    if any(not set(names[role]) <= own for role, own in _OWN_NAMES.items()):
        described["roles"] = {role: found for role, found in names.items() if found}
    return described
