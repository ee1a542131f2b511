"""TRL: the key `datasets` of `trl sft --config FILE` (`trl.DatasetMixtureConfig`).

From 1.8 on an entry has a `fraction`: the share of the source in the mixture, which is made as large as it can be without
using a row twice. Earlier versions only put data sets together, so they are given a mix.
"""

from functools import partial
from typing import Any

import yaml

from bilevel.errors import InputError
from bilevel_llm.data.layout import MESSAGES
from bilevel_llm.exporters.weighted_data import MAKE_A_MIX, WeightedData, WeightedSource


def export(data: WeightedData, *, fractions: bool) -> dict[str, str]:
    """One YAML file. fractions: whether this version of TRL has them."""
    if not fractions and not data.mixed:
        raise InputError(f"TRL before 1.8 has no weights; {MAKE_A_MIX}")
    if data.stop == "all":
        raise InputError(
            "TRL's fractions never use a row twice, so --stop all cannot be had; draw a mix with repeats instead"
        )
    _ = data.layout  # all sources must be laid out alike: TRL concatenates them
    entries = [_entry(source, weighted=not data.mixed) for source in data.sources]
    header = f"# weights: {data.origin}\n"
    return {"datasets.yaml": header + yaml.safe_dump({"datasets": entries}, sort_keys=False, allow_unicode=True, width=1000)}


with_fractions = partial(export, fractions=True)
without_fractions = partial(export, fractions=False)


def _entry(source: WeightedSource, *, weighted: bool) -> dict[str, Any]:
    layout = source.layout
    known = layout == MESSAGES or layout.format in ("text", "prompt_completion")
    if not known or not source.roles <= {"system", "user", "assistant"}:
        roles = f" with the roles {', '.join(sorted(source.roles))}" if source.roles else ""
        raise InputError(
            f"source {source.name!r}: TRL reads messages of role and content (system, user, assistant), prompt and "
            f"completion, or text, but the rows are {layout}{roles}; {MAKE_A_MIX}"
        )
    if source.kind == "saved":
        raise InputError(f"source {source.name!r}: TRL does not read what save_to_disk wrote; {MAKE_A_MIX}")
    entry = {"path": source.kind, "data_files": [str(file) for file in source.files], "columns": list(source.columns)}
    return {**entry, "fraction": source.weight} if weighted else entry
