"""The weights alone."""

import csv
import io
import json

from bilevel_llm.reweighting.saved_run import WeightedRun


def as_json(run: WeightedRun) -> str:
    """{source: weight}; `bilevel mix --weights FILE` reads it."""
    return json.dumps(dict(run.weights), indent=1, ensure_ascii=False) + "\n"


def as_csv(run: WeightedRun) -> str:
    """The columns source and weight."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("source", "weight"), *run.weights.items()])
    return text.getvalue()
