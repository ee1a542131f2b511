"""Megatron: a blend of tokenized data sets, as Megatron-LM and NeMo read it: weights and prefixes in turn.

A prefix stands for PREFIX.bin and PREFIX.idx, which Megatron's own `preprocess_data.py` makes of a file; it appends
`_text_document` to the prefix that it is given. A blend draws sequences of equal length, so its weights are shares of
tokens. Those of a run are shares of rows: with w_i of source i, whose rows have t_i tokens on average, the share of its
tokens is w_i t_i / Σ_j w_j t_j.
"""

import json
import logging

import numpy as np
from packaging.version import Version

from bilevel.errors import InputError
from bilevel_llm.data.layout import TextLayout
from bilevel_llm.exporters.exporter import Exporter
from bilevel_llm.exporters.weighted_data import WeightedData

log = logging.getLogger("bilevel.llm")

SUFFIX = "_text_document"
"""What preprocess_data.py appends."""


class Megatron(Exporter):
    """A JSON list ["0.7", "/data/web_text_document", "0.3", ...], with a prefix for each file of the sources."""

    def export(self, data: WeightedData, version: Version) -> dict[str, str]:
        """One JSON file. See `Exporter.export`."""
        if data.mix is not None:
            raise InputError("a blend has weights of its own, so --mix has no meaning here; leave it out")
        tables = data.run.problem.source_tables
        tokens: dict[str, float] = {}  # of each file, for one row that is drawn
        for source in data.sources:
            if not isinstance(source.layout, TextLayout):
                raise InputError(
                    f"source {source.name!r}: a blend is of texts, and the rows are {source.layout}; there is no faithful "
                    "export"
                )
            table = tables[source.name]
            if table.truncated:
                log.warning(
                    "%d of %d rows of %r were cut at problem.max_length tokens, and Megatron trains on whole rows: the "
                    "share of this source is larger than is written here",
                    table.truncated,
                    len(table),
                    source.name,
                )
            of_file = np.bincount(table.file, table.lengths, len(table.files))
            for file, count in zip(table.files, of_file, strict=True):
                prefix = str(file.resolve().with_suffix("")) + SUFFIX
                if prefix in tokens:
                    raise InputError(f"two files would have the prefix {prefix}; give {file} another name")
                tokens[prefix] = source.weight * float(count) / len(table)
        total = sum(tokens.values())
        blend = [part for prefix, share in tokens.items() if share for part in (repr(share / total), prefix)]
        return {"blend.json": json.dumps(blend, indent=1, ensure_ascii=False) + "\n"}
