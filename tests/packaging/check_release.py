"""Everything that has to be true of a release, and the text that the second person signs. `make release-check` runs it.

    .venv/bin/python -m tests.packaging.check_release --twine .venv/release/bin/twine

All checks run even if one fails. The packages are built from clones of the last commit, so nothing else that lies around is in them.
"""

import argparse
import hashlib
import json
import re
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Callable
from pathlib import Path

import yaml

from tests.packaging.check_wheel import ROOT, build, check_content, check_origin, expect, install, run

RECIPE = ROOT / "examples" / "smallest" / "recipe.yaml"
SIGN_OFF = """
Sign-off, for the second person, who has run `make release-check` on a machine of their own:

    I have built bilevel {version} from commit {commit}, and have the same files, byte for byte:
{hashes}
    I have followed the quick start of the README in a fresh clone, and read the section of the changelog as a user would.

    Name, date:
"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--twine", type=Path, default=Path(sys.executable).with_name("twine"), help="the program")
    twine = options.parse_args().twine
    passed = [check("nothing is changed or left over beside the last commit", check_tree)]
    passed += [check("pyproject.toml, CITATION.cff and CHANGELOG.md agree", lambda: check_versions(ROOT))]
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        built: dict[str, list[Path]] = {}
        passed += [check("two builds in two places are equal, byte for byte", lambda: built.update(build_twice(work)))]
        if built:
            wheel, sdist = built["first"]
            passed += [
                check("the index would take both files", lambda: run(twine, "check", "--strict", wheel, sdist)),
                check("the wheel has the packages, their types and templates, and no tests", lambda: check_content(wheel)),
                check(
                    "the source distribution has the licence, the tests and the documentation", lambda: check_sdist(sdist)
                ),
                check("installed in a clean environment, it learns known weights", lambda: check_use(work, wheel)),
            ]
            print("\n" + hashes(built["first"]))
        if not all(passed):
            sys.exit(f"\nnot a release: {passed.count(False)} of {len(passed)} checks failed")
        commit = run("git", "rev-parse", "HEAD").stdout.strip()
        print(SIGN_OFF.format(version=project_version(ROOT), commit=commit, hashes=hashes(built["first"], "      ")))


def check(claim: str, holds: Callable[[], object]) -> bool:
    """Print whether a claim holds; if it does not, also why."""
    try:
        holds()
    except (AssertionError, SystemExit) as error:
        print(f"FAILED  {claim}\n        {error}", flush=True)
        return False
    print(f"ok      {claim}", flush=True)
    return True


def check_tree() -> None:
    changed = run("git", "status", "--porcelain").stdout.splitlines()
    assert not changed, f"commit or remove: {', '.join(line[3:] for line in changed)}"


def project_version(root: Path) -> str:
    return str(tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"])


def check_versions(root: Path) -> None:
    """One version, and one date of it, which is no longer "unreleased"."""
    version = project_version(root)
    citation = yaml.safe_load((root / "CITATION.cff").read_text())
    newest = re.search(r"^## \[([^\]]+)\] - (\S+)$", (root / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest, "CHANGELOG.md has no section of a version: `## [VERSION] - DATE`"
    assert str(citation["version"]) == version, f"CITATION.cff has version {citation['version']}, pyproject.toml {version}"
    assert newest[1] == version, f"the first section of CHANGELOG.md is of version {newest[1]}, pyproject.toml has {version}"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", newest[2]), f"CHANGELOG.md says {newest[2]!r} where {version} needs its date"
    released = str(citation.get("date-released"))
    assert released == newest[2], f"CITATION.cff has date-released {released}, CHANGELOG.md {newest[2]}"


def build_twice(work: Path) -> dict[str, list[Path]]:
    """The wheel and the source distribution of each of two clones of the last commit, dated by it."""
    dated = {"SOURCE_DATE_EPOCH": run("git", "log", "-1", "--format=%ct").stdout.strip()}
    built = {}
    for name in ("first", "second"):
        run("git", "clone", "--quiet", ROOT, work / name)
        wheel = build(work / f"{name}-dist", source=work / name, variables=dated)
        built[name] = [wheel, next(wheel.parent.glob("*.tar.gz"))]
    for one, other in zip(*built.values(), strict=True):
        assert sha256(one) == sha256(other), f"{one.name} differs between two builds of the same commit"
    return built


def check_sdist(sdist: Path) -> None:
    with tarfile.open(sdist) as packed:
        names = packed.getnames()
    base = sdist.name.removesuffix(".tar.gz")
    for name in ("LICENSE", "CHANGELOG.md", "pyproject.toml", "tests/test_docs.py", "docs/index.md", "Makefile"):
        assert f"{base}/{name}" in names, f"{sdist.name} lacks {name}"
    left_over = [name for name in names if re.search(r"__pycache__|\.venv|/runs/|/\.git/", name)]
    assert not left_over, f"{sdist.name} has {', '.join(left_over[:5])}"


def check_use(work: Path, wheel: Path) -> None:
    """The version it says is the one that was built, and the smallest recipe finds the clean sources."""
    bin_ = install(work / "env", wheel)
    elsewhere = work / "elsewhere"
    elsewhere.mkdir()
    check_origin(bin_, work / "env", elsewhere)
    expect(run(bin_ / "bilevel", "--version", cwd=elsewhere).stdout.strip(), f"bilevel {project_version(ROOT)}")
    run(bin_ / "bilevel", "run", RECIPE, "--output", "run", cwd=elsewhere)
    last = json.loads((elsewhere / "run" / "metrics.jsonl").read_text().splitlines()[-1])["upper"]
    clean = sum(weight for source, weight in last.items() if source.startswith("clean"))
    assert clean > 0.95, f"the clean sources have {clean:.3f} of the weight"


def hashes(files: list[Path], indent: str = "") -> str:
    return "\n".join(f"{indent}{sha256(file)}  {file.name}" for file in sorted(files))


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
