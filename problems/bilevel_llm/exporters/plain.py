"""The weights alone, for whatever reads JSON or CSV."""

import csv
import io
import json

from packaging.version import Version

from bilevel.errors import InputError
from bilevel_llm.exporters.exporter import Exporter
from bilevel_llm.exporters.weighted_data import WeightedData


class JsonWeights(Exporter):
    """{source: weight}; `bilevel mix --weights FILE` reads it."""

    def export(self, data: WeightedData, version: Version) -> dict[str, str]:
        """One JSON file. See `Exporter.export`."""
        _check_no_mix(data)
        return {"weights.json": json.dumps(dict(data.weights), indent=1, ensure_ascii=False) + "\n"}


class CsvWeights(Exporter):
    """The columns source and weight."""

    def export(self, data: WeightedData, version: Version) -> dict[str, str]:
        """One CSV file. See `Exporter.export`."""
        _check_no_mix(data)
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([("source", "weight"), *data.weights.items()])
        return {"weights.csv": text.getvalue()}


def _check_no_mix(data: WeightedData) -> None:
    if data.mix is not None:
        raise InputError("only the weights are written, so --mix has no meaning here; leave it out")
