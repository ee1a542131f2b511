"""What can be known of the image without docker: what it copies exists and suffices, and what it installs is in pyproject.toml."""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINES = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text()).splitlines()  # long ones are continued
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def stages() -> dict[str, list[str]]:
    """Name of a stage -> its instructions."""
    found: dict[str, list[str]] = {}
    for line in LINES:
        if begins := re.match(r"FROM .* AS (\S+)$", line):
            found[begins[1]] = []
        elif found and line and not line.startswith("#"):
            found[list(found)[-1]].append(line)
    return found


def copied(stage: str) -> list[str]:
    """What a stage takes from the repository."""
    copies = [line.split()[1:-1] for line in stages()[stage] if line.startswith("COPY ") and "--from" not in line]
    return [path.rstrip("/") for paths in copies for path in paths]


def ignored(path: str) -> bool:
    """As docker decides: the last line of .dockerignore that matches."""
    decision = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line.startswith("#") and fnmatch(path, line.removeprefix("!")):
            decision = not line.startswith("!")
    return decision


@pytest.mark.parametrize("stage", ["requirements", "wheel"])
def test_what_is_copied_exists_and_is_sent_to_the_build(stage: str) -> None:
    assert copied(stage)
    assert [path for path in copied(stage) if not (ROOT / path).exists() or ignored(path)] == []


def test_nothing_else_is_sent() -> None:
    needed = {path for stage in ("requirements", "wheel") for path in copied(stage)}
    assert {path.name for path in ROOT.iterdir() if not ignored(path.name)} == needed


def test_the_requirements_are_those_of_the_package_and_its_extras(tmp_path: Path) -> None:
    (extras,) = [line.partition("=")[2] for line in LINES if line.startswith("ARG EXTRAS=")]
    (step,) = [line.removeprefix("RUN ") for line in stages()["requirements"] if line.startswith("RUN ")]
    for name in copied("requirements"):
        shutil.copy(ROOT / name, tmp_path)
    command, _, written = step.partition(" > ")
    words = [sys.executable, *shlex.split(command)[1:-1], extras]
    listed = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.splitlines()
    assert written == "requirements.txt"
    optional = PROJECT["project"]["optional-dependencies"]
    assert listed == [
        *PROJECT["project"]["dependencies"],
        *(line for extra in extras.split(",") for line in optional[extra]),
    ]


def test_the_wheel_can_be_built_from_what_is_copied(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in copied("wheel"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    (step,) = [line for line in stages()["wheel"] if line.startswith("RUN python -m build ")]
    words = [sys.executable, *shlex.split(step)[2:-1], str(tmp_path / "dist")]
    subprocess.run(words, cwd=source, capture_output=True, text=True, check=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    packages = {Path(path).name for path in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]}
    assert packages <= {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}


@pytest.mark.parametrize(("stage", "index"), [("cpu", "cpu"), ("cuda", r"cu\d+")])
def test_both_images_install_tested_versions_and_run_as_nobody_in_particular(stage: str, index: str) -> None:
    steps = stages()[stage]
    (dependencies,) = [step for step in steps if "--extra-index-url" in step]
    assert re.search(rf"--extra-index-url https://download\.pytorch\.org/whl/{index} ", dependencies)
    assert "-c /requirements/constraints.txt -r /requirements/requirements.txt" in dependencies
    assert steps[-1] == "USER 10001"
    assert 'ENTRYPOINT ["bilevel"]' in stages()["base"]
