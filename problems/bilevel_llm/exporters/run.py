"""From a run directory to the files of another trainer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from bilevel.errors import InputError
from bilevel.files import write_atomic
from bilevel_llm.exporters.plain import as_csv, as_json
from bilevel_llm.exporters.trainers import find_exporter
from bilevel_llm.exporters.weighted_data import Stop, data_of_mix, data_of_run
from bilevel_llm.reweighting.saved_run import read_run

if TYPE_CHECKING:
    from bilevel.plugins import Plugins

PLAIN = {"json": ("weights.json", as_json), "csv": ("weights.csv", as_csv)}


def export(
    directory: Path,
    to: str,
    plugins: Plugins,
    *,
    output: Path | None = None,
    weights: str = "average",
    mix: Path | None = None,
    stop: Stop = "first",
    seed: int = 0,
    trainer_version: str | None = None,
    allow_changed_data: bool = False,
) -> dict[str, str]:
    """The files that tell a trainer the weights, by name.

    output: where they will be written, for files that name each other. Nothing is written.
    to: "json", "csv" or one of `trainers.TRAINERS`. mix: a file that `bilevel mix` wrote, to be trained on instead of the
    sources. See `read_run` for weights, `Stop` for stop.

    Raises `InputError` for what does not fit: run, weights, changed data, an unknown trainer or version, rows that the
    trainer cannot read.
    """
    if to in PLAIN:
        if mix is not None or trainer_version is not None:
            raise InputError(f"--to {to} writes the weights alone: --mix and --trainer-version have no meaning there")
        name, write_plain = PLAIN[to]
        return {name: write_plain(read_run(directory, plugins, weights))}
    where = (output or Path()).resolve()
    exporter = find_exporter(to, trainer_version)
    run = read_run(directory, plugins, weights)
    if not allow_changed_data:
        run.check_data()
    return exporter(data_of_mix(mix, run, where) if mix is not None else data_of_run(run, where, stop=stop, seed=seed))


def check_free(output: Path) -> None:
    """Raises `InputError` if something is there."""
    if output.exists():
        raise InputError(f"output {output} exists, and nothing is overwritten; name another or remove it")


def write(files: Mapping[str, str], output: Path) -> None:
    """Write one file as `output`, several into a directory of that name."""
    check_free(output)
    target = output.parent if len(files) == 1 else output
    target.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomic(output if len(files) == 1 else output / name, content)
