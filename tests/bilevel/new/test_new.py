"""`bilevel new` writes packages that pass their own tests, and refuses names that are none or are taken."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bilevel.cli import app
from bilevel.errors import InputError
from bilevel.new.write import new
from bilevel.testing.session import plugins

EXAMPLE = Path(__file__).parents[3] / "examples" / "third_party_plugin"


@pytest.mark.parametrize("kind", ["problem", "solver", "check", "baseline"])
def test_a_package_passes_its_own_tests_as_it_is_written(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ended = CliRunner().invoke(app, ["new", kind, f"demo-{kind}"])
    assert ended.exit_code == 0, ended.output
    directory = tmp_path / f"bilevel-demo-{kind}"
    monkeypatch.syspath_prepend(directory)
    file = directory / "tests" / f"test_bilevel_demo_{kind}.py"
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tests = [value for name, value in vars(module).items() if name.startswith("test_")]
    assert len(tests) >= 2
    for test in tests:
        test()
    for name in [name for name in sys.modules if name.startswith(f"bilevel_demo_{kind}")]:
        monkeypatch.delitem(sys.modules, name)


def test_the_example_is_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "bilevel_calibration"]:
        monkeypatch.delitem(sys.modules, name)  # another test may have used the example
    written = new("problem", "calibration", plugins(), into=tmp_path / "new")
    files = {path.relative_to(written) for path in written.rglob("*") if path.is_file()}
    tracked = {p.relative_to(EXAMPLE) for p in EXAMPLE.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert {path for path in tracked if "egg-info" not in str(path)} == files
    for path in files:
        assert (EXAMPLE / path).read_text() == (written / path).read_text(), path


REFUSED = {
    "no name": ("solver", "My Solver", "'My Solver' is no name for a part; .*: my-solver"),
    "a name that ends in a hyphen": ("solver", "mine-", "is no name for a part"),
    "a path": ("problem", "../x", "is no name for a part"),
    "a part that is there": ("solver", "f2sa", "there is a solver named 'f2sa' already, of the plugin 'bilevel'"),
    "a module that is there": ("problem", "theory", "a module bilevel_theory is installed already"),
    "a class that hides another": ("solver", "solver", "would have the class Solver, which hides another"),
    "an unknown kind": ("solvr", "mine", "no template is named 'solvr'; did you mean 'solver'"),
}


@pytest.mark.parametrize(("kind", "name", "message"), REFUSED.values(), ids=REFUSED)
def test_a_name_that_would_not_do_is_refused_and_nothing_is_written(
    kind: str, name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        new(kind, name, plugins())
    assert not os.listdir()


def test_a_directory_that_exists_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exists already, and nothing is written over it"):
        new("problem", "mine", plugins(), into=tmp_path)
    assert not os.listdir(tmp_path)
