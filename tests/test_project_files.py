"""What outsiders rely on beside the code: the workflows, the hooks before a commit, the templates, and how to cite."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def steps(workflow: Path) -> list[dict[str, Any]]:
    return [step for job in yaml.safe_load(workflow.read_text())["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_targets_that_exist(workflow: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    run = {target for step in steps(workflow) for target in re.findall(r"make ([\w-]+)", step.get("run", ""))}
    assert run
    assert run <= targets


def test_the_workflows_cover_what_make_test_does() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (parts,), (checks,) = (
        re.findall(pattern, makefile, re.MULTILINE) for pattern in (r"^test: checks (.*)$", r"^CHECKS := (.*)$")
    )
    run = {step["run"].removeprefix("make ") for workflow in WORKFLOWS for step in steps(workflow) if "run" in step}
    assert {*parts.split(), *checks.split()} <= run


def test_the_tests_run_on_every_supported_version_of_python() -> None:
    versions = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["test"]["strategy"]["matrix"]
    assert f">={versions['python-version'][0]}" == PROJECT["requires-python"]
    assert versions["python-version"] == ["3.11", "3.12", "3.13"]


def floors(requirements: list[str]) -> dict[str, str]:
    """Name -> the lowest version that is admitted; a requirement without one fails here."""
    return {
        canonicalize_name(requirement.name): specifier.version
        for requirement in map(Requirement, requirements)
        for specifier in [next(part for part in requirement.specifier if part.operator == ">=")]
    }


def test_the_oldest_versions_to_test_with_are_those_that_the_package_admits() -> None:
    extras = PROJECT["optional-dependencies"]
    admitted = floors([*PROJECT["dependencies"], *(line for name in extras if name != "docs" for line in extras[name])])
    lines = (ROOT / "oldest.txt").read_text().splitlines()
    pinned = {
        canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines if line[0] != "#")
    }
    assert {name: Version(pinned[name]) for name in admitted} == {name: Version(floor) for name, floor in admitted.items()}


def test_the_hooks_before_a_commit_run_what_make_lint_runs() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = {hook["entry"].split()[0].removeprefix(".venv/bin/") for hook in repository["hooks"]}
    recipe = (ROOT / "Makefile").read_text().split("lint: $(READY)\n")[1].split("\n\n")[0]
    assert hooks == set(re.findall(r"\$\(BIN\)/([\w-]+)", recipe))


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.name)
def test_forms_of_issues_have_what_github_requires(form: Path) -> None:
    content = yaml.safe_load(form.read_text())
    assert {"name", "description", "body"} <= set(content)
    assert all(part["type"] == "markdown" or part["attributes"]["label"] for part in content["body"])
    identifiers = [part["id"] for part in content["body"] if "id" in part]
    assert len(identifiers) == len(set(identifiers))


def test_the_citation_has_the_required_keys() -> None:
    assert {"cff-version", "message", "title", "authors"} <= set(CITATION)
    assert all({"type", "title", "authors"} <= set(reference) for reference in CITATION["references"])


def test_the_citation_is_of_this_version_under_this_licence() -> None:
    assert (str(CITATION["version"]), CITATION["license"]) == (PROJECT["version"], PROJECT["license"])


def test_every_paper_that_a_solver_or_baseline_names_is_cited() -> None:
    modules = [*(ROOT / "bilevel" / "solvers").glob("*.py"), *(ROOT / "problems" / "bilevel_llm" / "baselines").glob("*.py")]
    cited = {reference["url"].removeprefix("https://arxiv.org/abs/") for reference in CITATION["references"]}
    named = {
        match[1] for module in modules if (match := re.match(r'"""[^:]+:.*?(\d{4}\.\d{5})', module.read_text(), re.DOTALL))
    }
    assert len(named) > 8
    assert named <= cited
