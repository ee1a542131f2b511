"""ARCHITECTURE.md draws the layers that import-linter enforces, and leads to files that exist."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "ARCHITECTURE.md").read_text()
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]


def drawn() -> list[list[str]]:
    """The cells of every row of the picture."""
    lines = [
        line for block in re.findall(r"^```text\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE) for line in block.splitlines()
    ]
    return [[cell.strip() for cell in re.findall(r"│([^│]+)(?=│)", line)] for line in lines if line.startswith("│")]


def layers(contract: dict[str, Any]) -> list[set[str]]:
    return [set(re.split(r" [|:] ", layer)) for layer in contract["layers"]]


@pytest.mark.parametrize("contract", [c for c in CONTRACTS if c["type"] == "layers"], ids=lambda c: c["name"])
def test_the_layers_are_drawn_in_their_order(contract: dict[str, Any]) -> None:
    rows = drawn()
    for container in contract["containers"]:
        beneath = rows[rows.index([container]) + 1 :]
        length = next((i for i, row in enumerate(beneath) if len(row) == 1), len(beneath))
        assert [set(row[0].split(" · ")) for row in beneath[:length]] == layers(contract)


@pytest.mark.parametrize("contract", [c for c in CONTRACTS if c["type"] == "independence"], ids=lambda c: c["name"])
def test_packages_that_never_import_each_other_stand_side_by_side(contract: dict[str, Any]) -> None:
    assert any(set(contract["modules"]) <= set(row) for row in drawn())


def test_the_plugins_drawn_are_those_that_the_core_must_not_import() -> None:
    (forbidden,) = (c["forbidden_modules"] for c in CONTRACTS if c["type"] == "forbidden")
    assert {cell for cell in drawn()[0] if cell} == set(forbidden)


def test_the_files_it_names_exist() -> None:
    named = re.findall(r"`([\w./]+(?:\.py|/))`", PAGE)
    assert named
    assert not [name for name in named if not (ROOT / name).exists()]
