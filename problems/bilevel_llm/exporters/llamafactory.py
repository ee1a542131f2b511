"""LLaMA-Factory: its arguments `dataset`, `mix_strategy` and `interleave_probs`, and a dataset_info.json that they name.

Interleaving is by rows with the given probabilities; `interleave_under` stops when the first source is used up,
`interleave_over` when all are. A data set of LLaMA-Factory is one file, so a source of several files is listed once for
each, with its weight shared by rows.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from packaging.version import Version

from bilevel.errors import InputError
from bilevel_llm.data.files import file_type
from bilevel_llm.data.layout import ChatLayout, InstructionLayout, TextLayout
from bilevel_llm.exporters.exporter import SHARES, Exporter
from bilevel_llm.exporters.weighted_data import MAKE_A_MIX, WeightedData, WeightedSource

STRATEGIES = {"first": "interleave_under", "all": "interleave_over"}
_READS = (".json", ".jsonl", ".parquet")


class LlamaFactory(Exporter):
    """Training arguments of LLaMA-Factory, and the description of data sets that they name."""

    package = "llamafactory"
    versions = ">=0.9,<0.9.6"
    checked = "0.9.5"
    interleaves = True

    def export(self, data: WeightedData, version: Version) -> dict[str, str]:
        """A directory: data.yaml, to be added to the training arguments, and dataset_info.json. See `Exporter.export`."""
        entries: dict[str, dict[str, Any]] = {}
        probabilities: list[float] = []
        for source in data.sources:
            description = _description(source)
            total = sum(source.files.values())
            names = _names(source, entries)
            for name, (file, rows) in zip(names, source.files.items(), strict=True):
                _check_file(source, file)
                entries[name] = {"file_name": str(file), **description}
                probabilities.append(source.weight * rows / total)
        arguments: dict[str, Any] = {"dataset_dir": str(data.directory), "dataset": ",".join(entries)}
        if len(entries) > 1:
            arguments["mix_strategy"] = STRATEGIES[data.stop]
            arguments["interleave_probs"] = ",".join(map(repr, probabilities))
        if any(isinstance(source.layout, TextLayout) for source in data.sources):
            _ = data.layout  # pre-training on texts and tuning on answers are two stages
            arguments["stage"] = "pt"
        header = f"# weights: {data.run.origin}\n{SHARES}"
        return {
            "data.yaml": header + yaml.safe_dump(arguments, sort_keys=False, allow_unicode=True, width=1000),
            "dataset_info.json": json.dumps(entries, indent=2, ensure_ascii=False) + "\n",
        }


def _names(source: WeightedSource, taken: dict[str, dict[str, Any]]) -> list[str]:
    """A name for each file; LLaMA-Factory separates names by commas."""
    base = source.name.replace(",", "_").strip()
    names = [base] if len(source.files) == 1 else [f"{base}-{number}" for number in range(1, len(source.files) + 1)]
    if twice := [name for name, count in Counter([*taken, *names]).items() if count > 1]:
        raise InputError(
            f"two data sets would be called {twice[0]!r} in LLaMA-Factory; rename the source in a JSON of weights"
        )
    return names


def _check_file(source: WeightedSource, file: Path) -> None:
    if file_type(file) not in _READS:
        raise InputError(f"source {source.name!r}: LLaMA-Factory reads {', '.join(_READS)}, not {file.name}; {MAKE_A_MIX}")


def _description(source: WeightedSource) -> dict[str, Any]:
    """How dataset_info.json says what a row is."""
    match source.layout:
        case InstructionLayout(instruction=instruction, output=output, input=input):
            fields = {"prompt": instruction, "query": input, "response": output}
            columns = {key: field for key, field in fields.items() if field in source.columns}
            return {"formatting": "alpaca", "columns": columns}
        case TextLayout(field=field):
            return {"columns": {"prompt": field}}
        case ChatLayout(fields=(field,), role=role, text=text):
            tags = {"role_tag": role, "content_tag": text, **_role_tags(source)}
            return {"formatting": "sharegpt", "columns": {"messages": field}, "tags": tags}
        case layout:
            raise InputError(
                f"source {source.name!r}: LLaMA-Factory cannot put rows of {layout} before the model as the run did; "
                "there is no faithful export"
            )


def _role_tags(source: WeightedSource) -> dict[str, str]:
    tags = {}
    for role in ("user", "assistant", "system"):
        names = source.names_of(role)
        if len(names) > 1:
            raise InputError(
                f"source {source.name!r} calls the {role} by several names ({', '.join(names)}), and LLaMA-Factory would "
                f"leave rows out; {MAKE_A_MIX}"
            )
        tags[f"{role}_tag"] = names[0] if names else role
    return tags
