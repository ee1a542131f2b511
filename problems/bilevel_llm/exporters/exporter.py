"""What an exporter is: the base class of all exporters.

A plugin adds an exporter through the hook `bilevel_exporters`, just as this package adds its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from bilevel.errors import InputError

if TYPE_CHECKING:
    from bilevel_llm.exporters.weighted_data import WeightedData


SHARES = (
    "# the weights are shares of rows; this trainer averages the loss over the tokens of a batch, so that sources with\n"
    "# long answers count for more than their share\n"
)
"""What a file for a trainer that averages over tokens says."""


class Exporter(ABC):
    """Writes weighted data in the form that a trainer reads. It has no state.

    package: the name of the trainer on PyPI; None for a form that does not depend on the version of a trainer.
    versions: the versions that are known to read what is written, as a specifier such as ">=0.17,<0.20".
    checked: the newest version that was tried.
    interleaves: whether the trainer draws rows by the weights while it trains, until a source is used up.
    """

    package: ClassVar[str | None] = None
    versions: ClassVar[str] = ""
    checked: ClassVar[str] = "0"
    interleaves: ClassVar[bool] = False

    @abstractmethod
    def export(self, data: WeightedData, version: Version) -> dict[str, str]:
        """The files to write: name -> content.

        version: the version of the trainer, one of `versions`.

        Raises `InputError` for what cannot be expressed in the trainer's settings.
        """

    def known_version(self, wanted: str | None) -> Version:
        """The wanted version of the trainer; None takes the newest one checked. Raises `InputError` for an unknown one."""
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
