"""From a run directory to the files of another trainer."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from bilevel.errors import InputError
from bilevel.files import remove_leftovers, written_whole
from bilevel.lock import owned
from bilevel_llm.exporters.exporter import Exporter
from bilevel_llm.exporters.weighted_data import Stop, WeightedData
from bilevel_llm.reweighting.saved_run import read_run

log = logging.getLogger("bilevel.llm")

if TYPE_CHECKING:
    from bilevel.plugins import Plugins


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
    to: the name of a registered exporter. mix: a file that `bilevel mix` wrote, to be trained on instead of the sources.
    See `read_run` for weights, `Stop` for stop.

    Raises `InputError` for what does not fit: run, weights, changed data, an unknown trainer or version, rows that the
    trainer cannot read.
    """
    exporter = find_exporter(to, plugins)
    version = exporter.known_version(trainer_version)
    where = (output or Path()).resolve()
    data = WeightedData(
        read_run(directory, plugins, weights), where, mix, stop=stop, seed=seed, allow_changed_data=allow_changed_data
    )
    files = exporter.export(data, version)
    if exporter.interleaves and mix is None and (note := data.interleaving_note()):
        log.warning("%s", note)
    return files


def find_exporter(name: str, plugins: Plugins) -> Exporter:
    """The registered exporter of that name. Raises `InputError` naming the nearest known one."""
    part = plugins.find("exporters", name)
    kind = part.load()
    if not (isinstance(kind, type) and issubclass(kind, Exporter)):
        raise InputError(
            f"the exporter {name!r} (plugin {part.plugin!r}): {part.target} must be a subclass of "
            "bilevel_llm.exporters.exporter.Exporter"
        )
    exporter: Exporter = kind()
    return exporter


def check_free(output: Path) -> None:
    """Raises `InputError` if something is there."""
    if output.exists():
        raise InputError(f"output {output} exists, and nothing is overwritten; name another or remove it")


def write(files: Mapping[str, str], output: Path) -> None:
    """Write one file as `output`, several into a directory of that name, which appears when it is complete."""
    check_free(output)
    with owned(output, file=True):
        remove_leftovers(output.parent, output.name)
        check_free(output)
        with written_whole(output) as part:
            if len(files) > 1:
                part.mkdir()
            for name, content in files.items():
                (part / name if len(files) > 1 else part).write_bytes(content.encode())
