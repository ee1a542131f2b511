"""TRL: the key `datasets` of `trl sft --config FILE` (`trl.DatasetMixtureConfig`).

From 1.8 on an entry has a `fraction`: the share of the source in the mixture, which is made as large as it can be without
using a row twice. Earlier versions only put data sets together, so they are given a mix.
"""

from typing import Any

import yaml
from packaging.version import Version

from bilevel.errors import InputError
from bilevel_llm.data.layout import ChatLayout, CompletionLayout, Layout, TextLayout
from bilevel_llm.exporters.exporter import SHARES, Exporter
from bilevel_llm.exporters.weighted_data import MAKE_A_MIX, WeightedData, WeightedSource

_FRACTIONS_SINCE = Version("1.8")


class TRL(Exporter):
    """The key `datasets` of a configuration of TRL."""

    package = "trl"
    versions = ">=0.25,<1.17"
    checked = "1.16.0"

    def export(self, data: WeightedData, version: Version) -> dict[str, str]:
        """One YAML file. See `Exporter.export`."""
        if version < _FRACTIONS_SINCE and data.mix is None:
            raise InputError(f"TRL before {_FRACTIONS_SINCE} has no weights; {MAKE_A_MIX}")
        if data.stop == "all":
            raise InputError(
                "TRL's fractions never use a row twice, so --stop all cannot be had; draw a mix with repeats instead"
            )
        _ = data.layout  # all sources must be laid out alike: TRL concatenates them
        entries = [_entry(source, weighted=data.mix is None) for source in data.sources]
        header = f"# weights: {data.run.origin}\n{SHARES}"
        listed = yaml.safe_dump({"datasets": entries}, sort_keys=False, allow_unicode=True, width=1000)
        return {"datasets.yaml": header + listed}


def _entry(source: WeightedSource, *, weighted: bool) -> dict[str, Any]:
    if not _reads(source.layout) or not source.roles <= {"system", "user", "assistant"}:
        roles = f" with the roles {', '.join(sorted(source.roles))}" if source.roles else ""
        raise InputError(
            f"source {source.name!r}: TRL reads messages of role and content (system, user, assistant), prompt and "
            f"completion, or text, but the rows are {source.layout}{roles}; {MAKE_A_MIX}"
        )
    if source.kind == "saved":
        raise InputError(f"source {source.name!r}: TRL does not read what save_to_disk wrote; {MAKE_A_MIX}")
    entry = {"path": source.kind, "data_files": [str(file) for file in source.files], "columns": list(source.columns)}
    return {**entry, "fraction": source.weight} if weighted else entry


def _reads(layout: Layout) -> bool:
    """TRL knows rows by the names of their columns."""
    match layout:
        case ChatLayout(fields=("messages",) | ("prompt", "completion"), role="role", text="content"):
            return True
        case CompletionLayout(prompt="prompt", completion="completion") | TextLayout(field="text"):
            return True
        case _:
            return False
