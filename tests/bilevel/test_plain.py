"""Settings as plain data are the same in every process, and differ where the settings do."""

import subprocess
import sys
from functools import partial
from typing import Any

import pytest

from bilevel.plain import to_plain


class Part:
    """A part as somebody writes it who knows nothing of dataclasses."""

    def __init__(self, rate: float = 0.1) -> None:
        self.rate = rate
        self.inner = object()


@pytest.mark.parametrize(
    "make",
    [
        object,
        Part,
        lambda: partial(print, Part()),
        lambda: [Part(), {"part": Part()}],
        lambda: iter([1]),
        lambda: slice(Part()),
    ],
)
def test_no_address_gets_into_plain_data(make: Any) -> None:
    first, second = make(), make()
    assert to_plain(first) == to_plain(second)
    assert "0x" not in str(to_plain(first))


def test_objects_of_other_settings_are_told_apart() -> None:
    assert to_plain(Part(0.1)) != to_plain(Part(0.2))
    assert to_plain(partial(print, 1)) != to_plain(partial(print, 2))


def test_a_set_has_the_same_order_in_every_process() -> None:
    code = "from bilevel.plain import to_plain; print(to_plain(set('abcdefgh')))"
    seen = {
        subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
                       capture_output=True, text=True, check=True).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(seen) == 1
