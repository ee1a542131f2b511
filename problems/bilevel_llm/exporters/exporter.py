"""What an exporter is: the base class of all of them.

A plugin adds one by the hook `bilevel_exporters`, as this package adds its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from bilevel.errors import InputError

if TYPE_CHECKING:
    from bilevel_llm.exporters.weighted_data import WeightedData


class Exporter(ABC):
    """Writes weighted data in the form that one trainer reads. It has no state.

    package: the trainer's name on PyPI; None for a form that no trainer's version changes.
    versions: those that are known to read what is written, as a specifier: ">=0.17,<0.20".
    checked: the newest version that was tried.
    """

    package: ClassVar[str | None] = None
    versions: ClassVar[str] = ""
    checked: ClassVar[str] = "0"

    @abstractmethod
    def export(self, data: WeightedData, version: Version) -> dict[str, str]:
        """The files to write, by name: their contents.

        version: of the trainer, one of `versions`.

        Raises `InputError` for what the trainer cannot be told.
        """

    def known_version(self, wanted: str | None) -> Version:
        """A version of the trainer that is known; None takes the newest that was checked. Raises `InputError`."""
        if wanted is None:
            return Version(self.checked)
        if self.package is None:
            raise InputError("--trainer-version has no meaning here: what is written does not depend on a trainer's version")
        try:
            version = Version(wanted)
        except InvalidVersion as error:
            raise InputError(f"--trainer-version {wanted!r} is not a version, as {self.checked} is") from error
        if version not in SpecifierSet(self.versions):
            raise InputError(
                f"what {self.package} {wanted} reads is not known; known: {self.versions}. Leave --trainer-version "
                f"out to write what {self.checked} reads, and check it, or use --to json"
            )
        return version
