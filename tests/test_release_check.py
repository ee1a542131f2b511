"""What `make release-check` says of versions and of what is packed. It runs as a whole before a release only."""

import io
import tarfile
from pathlib import Path

import pytest

from tests.packaging.check_release import check, check_sdist, check_versions

FILES = {
    "pyproject.toml": '[project]\nversion = "1.2.0"\n',
    "CITATION.cff": "version: 1.2.0\ndate-released: 2030-01-31\n",
    "CHANGELOG.md": "# Changelog\n\n## [1.2.0] - 2030-01-31\n\n## [1.1.0] - 2029-01-01\n",
}
PACKED = ("LICENSE", "CHANGELOG.md", "pyproject.toml", "tests/test_docs.py", "docs/index.md", "Makefile")


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("pyproject.toml", "", "", None),
        ("pyproject.toml", "1.2.0", "1.2.1", "CITATION.cff has version 1.2.0, pyproject.toml 1.2.1"),
        ("CHANGELOG.md", "[1.2.0]", "[1.1.5]", "the first section of CHANGELOG.md is of version 1.1.5"),
        ("CHANGELOG.md", "2030-01-31", "unreleased", "says 'unreleased' where 1.2.0 needs its date"),
        ("CHANGELOG.md", "## ", "### ", "has no section of a version"),
        ("CITATION.cff", "2030-01-31", "2030-01-30", "date-released 2030-01-30, CHANGELOG.md 2030-01-31"),
        ("CITATION.cff", "date-released", "date", "date-released None"),
    ],
)
def test_a_release_has_one_version_and_one_date(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, old: str, new: str, said: str | None
) -> None:
    for name, content in FILES.items():
        (tmp_path / name).write_text(content.replace(old, new) if name == file else content)
    assert check("they agree", lambda: check_versions(tmp_path)) == (said is None)
    printed = capsys.readouterr().out
    assert printed.startswith("ok " if said is None else "FAILED ")
    assert (said or "they agree") in printed


@pytest.mark.parametrize("without", [None, *PACKED])
@pytest.mark.parametrize("also", [None, "runs/demo/weights.json"])
def test_a_source_distribution_lacks_nothing_and_has_nothing_left_over(
    tmp_path: Path, without: str | None, also: str | None
) -> None:
    with tarfile.open(tmp_path / "some-1.0.tar.gz", "w:gz") as sdist:
        for name in {*PACKED, also} - {without, None}:
            sdist.addfile(tarfile.TarInfo(f"some-1.0/{name}"), io.BytesIO())
    fine = without is None and also is None
    assert check("it is whole", lambda: check_sdist(tmp_path / "some-1.0.tar.gz")) == fine
