"""The documentation says what is: its recipes build, its Python runs, its commands and links exist."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from bilevel.cli import app
from bilevel.config import load_config
from bilevel.plugins import Plugins

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]


def code(language: str, pages: list[Path] = PAGES) -> list[tuple[str, str]]:
    fence = re.compile(rf"^```{language}\n(.*?)^```", re.DOTALL | re.MULTILINE)
    return [(page.name, block) for page in pages for block in fence.findall(page.read_text())]


def recipes() -> list[tuple[str, str]]:
    """Whole recipes; those of the example plugin are run by the packaging check."""
    blocks = [(page, text, yaml.safe_load(text)) for page, text in code("yaml")]
    return [
        (page, text) for page, text, tree in blocks if tree.get("problem", {}).get("name", "calibration") != "calibration"
    ]


@pytest.mark.parametrize(("page", "text"), recipes())
def test_recipes_build(page: str, text: str, plugins: Plugins, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    load_config(tmp_path / "recipe.yaml", plugins)


def test_the_demo_recipe_builds(plugins: Plugins) -> None:
    config = load_config(ROOT / "examples" / "python_docs" / "recipe.yaml", plugins)
    assert [source.name for source in config.problem.sources] == ["reference", "docstrings", "code", "shuffled"]


def test_the_demo_compares_on_the_data_of_its_run(plugins: Plugins) -> None:
    run, compared = (
        load_config(ROOT / "examples" / "python_docs" / f"{n}.yaml", plugins).problem for n in ("recipe", "compare")
    )
    assert run.sources == compared.sources
    assert run.validation == compared.validation
    assert (run.model, run.max_length) == (compared.model, compared.max_length)


@pytest.mark.parametrize(("page", "text"), code("bash"))
def test_commands_exist_with_their_options(page: str, text: str) -> None:
    import typer

    group = typer.main.get_command(app)
    makefile = (ROOT / "Makefile").read_text()
    for line in text.splitlines():
        words = line.split("#")[0].split()
        if words[:1] == ["make"]:
            assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in words[1:]), line
        if words and words[0].removeprefix(".venv/bin/") == "bilevel":
            command = group.get_command(typer.Context(group), words[1])  # type: ignore[attr-defined]
            assert command is not None, line
            options = {option for parameter in command.params for option in parameter.opts}
            assert {word for word in words if word.startswith("--")} <= options, line


def test_the_formats_and_exporters_of_the_reference_can_be_registered() -> None:
    from bilevel_llm.data.format_contract import check_format

    names: dict[str, Any] = {"__name__": "my_package.my_module"}
    for _, block in code("python", [ROOT / "docs" / "reference.md"]):
        exec(compile(block, "reference.md", "exec"), names)
    check_format(names["Quiz"](), [{"question": "q", "answer": "a"}])
    data = SimpleNamespace(sources=[SimpleNamespace(weight=0.5, files={Path("a.jsonl"): 3})])
    exporter = names["MyTrainer"]()
    assert exporter.export(data, exporter.known_version("1.5")) == {"shares.json": '{"a.jsonl": 0.5}'}


@pytest.mark.parametrize("page", ["tutorial-new-problem.md"])
def test_the_tutorial_runs(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    for _, block in code("python", [ROOT / "docs" / page]):
        exec(compile(block.replace("steps=2000", "steps=30"), page, "exec"), {"__name__": "tutorial"})
    assert "ridge penalty" in capsys.readouterr().out


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
