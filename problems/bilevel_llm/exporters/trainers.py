"""The trainers that weights can be exported for, and the versions that are known to read what is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from bilevel.errors import InputError
from bilevel.suggest import did_you_mean
from bilevel_llm.exporters import axolotl, interleave, llamafactory, trl

if TYPE_CHECKING:
    from bilevel_llm.exporters.weighted_data import WeightedData

Exporter = Callable[["WeightedData"], dict[str, str]]
"""Weighted data -> the files to write, by name. Raises `InputError` for what the trainer cannot be told."""


@dataclass(frozen=True)
class Trainer:
    """package: its name on PyPI. known: versions -> exporter, the newest first. checked: the newest version tried."""

    package: str
    known: Mapping[str, Exporter]
    checked: str


TRAINERS: Mapping[str, Trainer] = {
    "interleave": Trainer("datasets", {">=3,<5.3": interleave.export}, "5.2.0"),
    "llamafactory": Trainer("llamafactory", {">=0.9,<0.9.6": llamafactory.export}, "0.9.5"),
    "trl": Trainer("trl", {">=1.8,<1.17": trl.with_fractions, ">=0.25,<1.8": trl.without_fractions}, "1.16.0"),
    "axolotl": Trainer("axolotl", {">=0.17,<0.20": axolotl.export}, "0.19.0"),
}


def find_exporter(trainer: str, version: str | None = None) -> Exporter:
    """The exporter for a trainer. version: of the trainer; None takes the newest that was checked.

    Raises `InputError` for a trainer or version that is not known.
    """
    if trainer not in TRAINERS:
        raise InputError(f"no exporter for {trainer!r}{did_you_mean(trainer, [*TRAINERS, 'json', 'csv'])}")
    known = TRAINERS[trainer]
    wanted = version or known.checked
    try:
        parsed = Version(wanted)
    except InvalidVersion as error:
        raise InputError(f"--trainer-version {wanted!r} is not a version, as {known.checked} is") from error
    for versions, exporter in known.known.items():
        if parsed in SpecifierSet(versions):
            return exporter
    raise InputError(
        f"what {known.package} {wanted} reads is not known; known: {' or '.join(known.known)}. Leave --trainer-version "
        f"out to write what {known.checked} reads, and check it, or use --to json"
    )
