"""What a shell completes."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from bilevel.cli import app


@pytest.fixture(autouse=True)
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text("solver: {name: scalebio, penalty: 20}\nrun: {steps: 9}\n")


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("bilevel des", ["describe"]),
        ("bilevel mi", ["mix"]),
        ("bilevel describe scale", ["scalebio"]),
        ("bilevel verify --solver f2sa", ["f2sa", "f2sa-p"]),
        ("bilevel baseline tem", ["temperature"]),
        ("bilevel run recipe.yaml --set solver.", ["solver.name=scalebio", "solver.penalty=20"]),
        ("bilevel run nowhere.yaml --set solver.", []),
    ],
)
def test_commands_names_and_keys_are_completed(line: str, found: list[str]) -> None:
    words = line.split()
    env = {"_BILEVEL_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    assert CliRunner().invoke(app, [], prog_name="bilevel", env=env).output.split() == found
