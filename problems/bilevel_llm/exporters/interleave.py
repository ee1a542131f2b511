"""`datasets.interleave_datasets`: a Python module that builds the data set from the sources."""

from packaging.version import Version

from bilevel.errors import InputError
from bilevel_llm.exporters.exporter import Exporter
from bilevel_llm.exporters.weighted_data import WeightedData, WeightedSource

STOPPING = {"first": "first_exhausted", "all": "all_exhausted"}

_MODULE = '''"""The sources of a reweighting run, interleaved by their weights.

Written by `bilevel export-weights`. `python THIS_FILE` shows the data set; `from THIS_FILE import data` uses it.
"""

from datasets import concatenate_datasets, interleave_datasets, load_dataset, load_from_disk

WEIGHTS_FROM = {origin!r}
SEED = {seed}
COLUMNS = {columns}
SOURCES = {{
{sources}}}
PROBABILITIES = {{
{probabilities}}}

data = interleave_datasets(
    [SOURCES[name].select_columns(COLUMNS).shuffle(seed=SEED) for name in PROBABILITIES],
    probabilities=list(PROBABILITIES.values()),
    seed=SEED,
    stopping_strategy={stopping!r},
)

if __name__ == "__main__":
    print(data)
'''


class Interleave(Exporter):
    """A module that calls `datasets.interleave_datasets`."""

    package = "datasets"
    interleaves = True
    versions = ">=3,<5.3"
    checked = "5.2.0"

    def export(self, data: WeightedData, version: Version) -> dict[str, str]:
        """One Python file. See `Exporter.export`."""
        if data.mix is not None:
            raise InputError("a mix needs no interleaving: datasets.load_dataset reads the file; leave --mix out")
        _ = data.layout  # all sources must be laid out alike
        columns = {source.columns for source in data.sources}
        shared = [name for name in data.sources[0].columns if all(name in fields for fields in columns)]
        if missing := sorted({name for fields in columns for name in fields} - set(shared)):
            raise InputError(
                f"only some of the sources have the field {missing[0]!r}, and the data set would differ from the run's; "
                "make one file of all by `bilevel mix`, which datasets.load_dataset reads"
            )
        text = _MODULE.format(
            origin=data.run.origin,
            seed=data.seed,
            columns=shared,
            sources="".join(f"    {source.name!r}: {_loading(source)},\n" for source in data.sources),
            probabilities="".join(f"    {source.name!r}: {source.weight!r},\n" for source in data.sources),
            stopping=STOPPING[data.stop],
        )
        return {"interleaved.py": text}


def _loading(source: WeightedSource) -> str:
    files = [str(file) for file in source.files]
    if source.kind == "saved":
        return f"concatenate_datasets([load_from_disk(file) for file in {files!r}])"
    return f'load_dataset({source.kind!r}, data_files={files!r}, split="train")'
