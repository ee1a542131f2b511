"""What the scripts of all packages share: data in, the settings to run, the iterates of x and their CPU times out.

Needs numpy alone, as each package runs in an environment of its own.

Usage: python run_PACKAGE.py PROBLEM DATA.npz SETTINGS.json RESULT.npz
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Finished(Exception):
    """As many steps were taken as were asked for."""


class Record:
    """The iterates of x, and the CPU time after each; the time of recording does not count.

    steps: how many there will be.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.iterates: list[Array] = []
        self.seconds: list[float] = []
        self.spent = 0.0
        self.started = time.process_time()

    def __call__(self, x: Any) -> None:
        """Take the x of a step; a tensor or an array. Raises `Finished` after the last one."""
        self.spent += time.process_time() - self.started
        self.iterates.append(np.array(x.detach() if hasattr(x, "detach") else x, dtype=np.float64))
        self.seconds.append(self.spent)
        if len(self.iterates) == self.steps:
            raise Finished
        self.started = time.process_time()

    def restart(self) -> None:
        """Do not count the time until now: that of compiling."""
        self.started, self.spent = time.process_time(), 0.0


Problems = Mapping[str, Callable[[Mapping[str, Any], Mapping[str, Any], Record], None]]
"""Problem -> what solves it, given data, settings and where to record."""


def main(problems: Problems, convert: Callable[[Array], Any]) -> None:
    """Run what the command line says.

    convert: makes the package's kind of array of a numpy array.
    """
    name, data, settings, result = sys.argv[1:]
    with np.load(data) as file:
        arrays = {key: file[key] for key in file}
    found: dict[str, Any] = {}
    runs = json.loads(Path(settings).read_text())
    with suppress(Exception):  # what is imported or set up at the first step of a process is not counted
        problems[name]({key: convert(value) for key, value in arrays.items()}, runs[0] | {"steps": 2}, Record(2))
    for number, chosen in enumerate(runs):
        record = Record(chosen["steps"])
        try:
            problems[name]({key: convert(value) for key, value in arrays.items()}, chosen, record)
        except Finished:
            pass
        except Exception as error:  # one setting may diverge; the next one need not
            print(f"{name}, {chosen}: {type(error).__name__}: {error}", file=sys.stderr)
        found[f"x{number}"] = np.array(record.iterates)
        found[f"seconds{number}"] = np.array(record.seconds)
    np.savez(result, **found)
