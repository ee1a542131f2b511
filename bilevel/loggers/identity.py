"""loggers/NAME.json in a run directory: by what a service knows the run, so that it goes on there when it is resumed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from bilevel.documents import read_json
from bilevel.files import write_atomic

if TYPE_CHECKING:
    from bilevel.run import Run


def known_as(run: Run, service: str) -> dict[str, str]:
    """What was kept; empty if nothing was. Raises `DamagedError` naming the file if it cannot be read."""
    file = _file(run, service)
    return read_json(file, dict[str, str]) if file is not None and file.exists() else {}


def keep(run: Run, service: str, identity: Mapping[str, str]) -> None:
    """Keep it, if the run has a directory."""
    file = _file(run, service)
    if file is not None:
        file.parent.mkdir(exist_ok=True)
        write_atomic(file, json.dumps(identity, indent=1))


def title_of(run: Run) -> str | None:
    """What to call the run where no name is set: as its directory."""
    return run.output.resolve().name if run.output is not None else None


def _file(run: Run, service: str) -> Path | None:
    return run.output / "loggers" / f"{service}.json" if run.output is not None else None
