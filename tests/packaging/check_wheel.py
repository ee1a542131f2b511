"""Build the package as it would be published, install it in a clean environment together with a third-party plugin, and
use both from a directory that knows nothing of this repository.

    .venv/bin/python tests/packaging/check_wheel.py
"""

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = ROOT / "examples" / "third_party_plugin"
PACKAGES = ("bilevel", "bilevel_problems", "bilevel_llm", "bilevel_backends", "bilevel_theory")
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MYPY"))} | {"OMP_NUM_THREADS": "1"}


def main() -> None:
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        wheel = build(work / "dist")
        check_content(wheel)
        bin_ = install(work / "env", wheel)
        elsewhere = work / "elsewhere"
        elsewhere.mkdir()
        check_origin(bin_, work / "env", elsewhere)
        check_list(bin_, elsewhere)
        check_run(bin_, elsewhere)
        check_types(bin_, elsewhere)
    print(f"packaging check passed in {time.monotonic() - started:.0f} s")


def build(into: Path, source: Path = ROOT, variables: Mapping[str, str] | None = None) -> Path:
    """The sdist, and the wheel made from it, as an installer would that finds no wheel. Returns the wheel."""
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", into, source, variables=variables)
    (wheel,) = into.glob("*.whl")
    return wheel


def check_content(wheel: Path) -> None:
    """The packages with their types, the licence, and nothing else: no tests, no docs."""
    names = zipfile.ZipFile(wheel).namelist()
    metadata = "-".join(wheel.name.split("-")[:2]) + ".dist-info"
    expect({name.split("/")[0] for name in names}, {*PACKAGES, metadata})
    for package in PACKAGES:
        expect(f"{package}/py.typed" in names, True)
    expect(f"{metadata}/licenses/LICENSE" in names, True)
    expect("bilevel/report/templates/page.html" in names, True)
    expect("bilevel/new/templates/package/pyproject.toml.jinja" in names, True)
    expect("bilevel_llm/templates/baseline/part.py.jinja" in names, True)


def install(env: Path, wheel: Path) -> Path:
    """A clean environment with the wheel, the sample plugin, and a plugin that is broken. Returns its directory of programs.

    To install torch again would take a minute, so everything but `bilevel` is linked in from the environment that runs
    this script. Its editable `bilevel` is two files (the path to the repository and the metadata), which are left out.
    Nothing can be fetched (--no-index): a requirement that pyproject.toml forgets, or asks too much of, fails here.
    """
    run(sys.executable, "-m", "venv", "--without-pip", env)
    paths = {"base": str(env), "platbase": str(env)}
    site = Path(sysconfig.get_path("purelib", "venv", vars=paths))
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "bilevel" not in entry.name and entry.name != "__pycache__":
            (site / entry.name).symlink_to(entry)
    bin_ = Path(sysconfig.get_path("scripts", "venv", vars=paths))
    run(bin_ / "python", "-m", "pip", "install", "-q", "--no-index", "--no-build-isolation", wheel, PLUGIN)

    (site / "broken_plugin.py").write_text("raise RuntimeError('no licence found')\n")
    metadata = site / "broken_plugin-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-plugin\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[bilevel]\nbroken = broken_plugin\n")
    return bin_


def check_origin(bin_: Path, env: Path, elsewhere: Path) -> None:
    """What is about to be checked is the wheel, not the repository."""
    code = "import {0}; print({0}.__file__)"
    for package in (*PACKAGES, "bilevel_calibration"):
        file = run(bin_ / "python", "-c", code.format(package), cwd=elsewhere).stdout.strip()
        expect(Path(file).is_relative_to(env), True)


def check_list(bin_: Path, elsewhere: Path) -> None:
    """Every part is listed, whoever brings it, and the one broken plugin with the reason."""
    listed = run(bin_ / "bilevel", "list", cwd=elsewhere)
    parts = {tuple(line.split()) for line in listed.stdout.splitlines()}
    expected = {
        ("problem", "llm-reweighting", "bilevel_llm", "bilevel_llm.reweighting.problem:LLMReweighting"),
        ("solver", "scalebio", "bilevel", "bilevel.solvers.scalebio:ScaleBiO"),
        ("backend", "torch", "bilevel_backends", "bilevel_backends.torch_backend:TorchBackend"),
        ("problem", "calibration", "calibration", "bilevel_calibration.problem:Calibration"),
    }
    expect(expected & parts, expected)
    expect(listed.stderr.strip(), "broken plugin 'broken': RuntimeError: no licence found")


def check_run(bin_: Path, elsewhere: Path) -> None:
    """The plugin's recipe runs to the solution, in spite of the broken plugin."""
    run(bin_ / "bilevel", "run", PLUGIN / "recipe.yaml", "--output", "run", cwd=elsewhere)
    records = [json.loads(line) for line in (elsewhere / "run" / "metrics.jsonl").read_text().splitlines()]
    expect([record["step"] for record in records], list(range(100)))
    solution = (4.0 - 2.0) / (1 + 0.25)
    expect(abs(records[-1]["upper"]["offset"] - solution) < 0.01, True)
    run(bin_ / "bilevel", "report", "run", cwd=elsewhere)
    expect("Upper variable over time" in (elsewhere / "report.html").read_text(), True)


def check_types(bin_: Path, elsewhere: Path) -> None:
    """A user's code, and the plugin's, pass the strictest type check against the installed packages."""
    files = [ROOT / "tests" / "packaging" / "consumer.py", PLUGIN / "bilevel_calibration" / "problem.py"]
    cache = ("--config-file=", "--cache-dir", ROOT / ".mypy_cache" / "packaging")
    run(bin_ / "python", "-m", "mypy", "--strict", *cache, *files, cwd=elsewhere)


def run(
    *command: str | Path, cwd: Path = ROOT, variables: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; it must succeed. variables: of its environment, beside the usual ones."""
    environment = ENVIRONMENT | dict(variables or {})
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"packaging check: {' '.join(map(str, command))} ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return done


def expect(found: object, wanted: object) -> None:
    assert found == wanted, f"found {found!r}, expected {wanted!r}"


if __name__ == "__main__":
    main()
